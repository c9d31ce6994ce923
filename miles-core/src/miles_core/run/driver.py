"""The driver of a run: starts its processes, and gives the loop its verbs.

Everything that is slow happens in other processes; the driver holds references and passes messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from miles_core.cluster.members import CollectorMember, Part, TeacherMember, TrainerMember
from miles_core.cluster.session import Call, Member, Session
from miles_core.config.schema import Plan, Stage
from miles_core.config.traits import TEACHER, loss_columns, needed_columns, stage_columns, top_k
from miles_core.errors import RunError, UserError
from miles_core.roles import RunInfo
from miles_core.run import checkpoint
from miles_core.run.checkpoint import Checkpoint, Saving
from miles_core.run.console import Console
from miles_core.run.engines import RunEngines
from miles_core.run.loop import train
from miles_core.run.model import prepare_teacher, vocabulary_size
from miles_core.run.observers import Observers
from miles_core.run.places import places
from miles_core.run.turns import Turns

POLICY = "policy"
"""Folder of the finished policy, in the run's."""
POLL_S = 10.0
"""How long the driver waits for a batch before it asks again whether the collector is alive."""
FROM_TRAINER = {"old_logprobs": "policy", "ref_logprobs": "reference"}
"""Token column -> what `Trainer.logprobs` is asked for."""


@dataclass(frozen=True, kw_only=True)
class BatchRef:
    """A batch in the object store. step: that trains on it; started: when the driver began to wait for it. columns: to
    be added to it, each in parts that stand end to end. finished: whether it has its advantages and weights."""

    ref: Any
    step: int
    stage: Stage
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    started: float
    finished: bool
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a step has to say. version: of the weights that it made."""

    version: int
    batch: BatchRef
    metrics: Mapping[str, float]


class Run:
    """One run, from a plan, perhaps from a checkpoint. `async with`, then the verbs of `miles_core.run.loop`."""

    def __init__(self, plan: Plan, model: Path, resumed: Checkpoint | None, console: Console) -> None:
        self.plan, self.model, self.resumed, self.console = plan, model, resumed, console
        self.step = resumed.step if resumed else 0
        self.session = Session(plan.cluster, places(plan), plan.folder / "logs")
        self.turns = Turns(self.session, sleeps=plan.placement.takes_turns)
        info = RunInfo(
            name=plan.name,
            folder=plan.folder,
            config=plan.values,
            steps=plan.steps,
            resumed=resumed.step if resumed else None,
        )
        self.observers = Observers(plan, info)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.trainers: list[Member] = []
        self.critics: list[Member] = []  # the trainers themselves, if the critic shares their ranks
        self.engines = RunEngines(plan, self.session, model, partial(console.say, style="red"))
        self.teachers: list[Member] = []
        self._begun: int | None = None  # the stage that the trainers and the collector are in
        self._unnamed: tuple[int, contextlib.AsyncExitStack] | None = None  # the checkpoint that is being written
        self._critic_begun: int | None = None  # that of the critic, which sits out stages without values

    # ---- Start and end -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Brings all members up, with the weights of the first version published."""
        if self.plan.teacher is not None:
            with self.console.phase("looking for the teacher"):
                self.teacher_model = prepare_teacher(self.plan.teacher.section, self.model)
        with self.console.phase("starting Ray"):
            self.session.start()  # on the main thread, where Ray sets its signal handlers
        with self.console.phase("starting trainer, engines and collector"):
            self._spawn()
            await self.engines.share_gpus(self.trainers)
            *_, remarks = await self.session.ask_all(self.session.members, "enter")  # no GPU is touched yet
            for remark in remarks:
                self.console.say(remark, "yellow")
            await self._start_members()
            if self.engines.members:
                await self._meet()
        await self._take_up()
        await self._generating(new=True)
        self.observers.tell("run_start")

    async def _take_up(self) -> None:
        """Begins the first stage, or goes on from the checkpoint. One that stands between two stages belongs to the
        first of them: the next begins with what that has left."""
        stage = self.plan.stages.index(self.plan.stage_of(max(self.step - 1, 0)))
        await self._begin(stage, self.resumed.folder if self.resumed else None)

    def _spawn(self) -> None:
        plan = self.plan
        shares = plan.critic_section is not None and plan.critic_section.shares
        self.trainers = [
            self.session.spawn(TrainerMember, f"trainer {rank}", plan, rank, ("policy", "critic")[: 1 + shares])
            for rank in range(plan.trainer_section.world_size)
        ]
        if plan.critic_section is not None:
            self.critics = (
                self.trainers
                if shares
                else [
                    self.session.spawn(TrainerMember, f"critic {rank}", plan, rank, ("critic",))
                    for rank in range(plan.critic_section.world_size)
                ]
            )
        self.engines.spawn()
        if plan.teacher is not None:
            known = vocabulary_size(self.model)
            self.teachers = [
                self.session.spawn(TeacherMember, f"teacher {index}", plan, index, self.teacher_model, known)
                for index in range(plan.teacher.engine_section.count)
            ]
        handles = [(engine.name, engine.actor, engine.log) for engine in self.engines.members]
        self.collector = self.session.spawn(CollectorMember, "collector", plan, self.model, handles)

    async def _start_members(self) -> None:
        """Engines that share their GPUs take what memory they find, so they start alone, and sleep."""
        if not self.plan.placement.takes_turns:
            await asyncio.gather(self._start_trainers(), self._start_engines())
            return
        await self._start_engines()
        await self.turns.begin(self.trainers, self.engines.members)
        await self._start_trainers()

    async def _start_trainers(self) -> None:
        reference = any("ref_logprobs" in stage_columns(stage) for stage in self.plan.stages)
        parts: list[tuple[Part, Sequence[Member], bool]] = [("policy", self.trainers, reference)]
        if self.critics is self.trainers:  # in their processes, where the critic finds the trainer's process group
            await self._start(*parts[0])
            await self._start("critic", self.critics, False)
            return
        if self.critics:
            parts.append(("critic", self.critics, False))
        await asyncio.gather(*(self._start(*part) for part in parts))

    async def _start(self, part: Part, members: Sequence[Member], reference: bool) -> None:
        address = await self.session.ask(members[0], "address")
        await self.session.ask_all(members, "start", part, address, self.model, reference)

    async def _start_engines(self) -> None:
        if served := [*self.engines.members, *self.teachers]:
            await self.session.ask_all(served, "start")

    async def _meet(self) -> None:
        """The trainer and the engines meet for publishing; anew, after engines have failed on the way."""
        while True:
            try:
                await self._connect()
                return
            except RunError:
                if not await self.engines.mend(self.collector, self.step, self.turns):
                    raise

    async def _connect(self) -> None:
        actors = [engine.actor for engine in self.engines.members]
        address, layout = (await self.session.ask_all(self.trainers, "open_sync", actors))[0]
        await self.session.gather(
            [
                *((trainer, "connect_sync", ()) for trainer in self.trainers),
                *self.engines.connections(address, layout),
            ]
        )

    async def _begin(self, stage: int, folder: Path | None = None) -> None:
        """Starts a stage everywhere, or goes on with it from a checkpoint."""
        await self._training()
        self._begun = stage
        await self.session.gather(
            [
                *((trainer, "begin", ("policy", stage)) for trainer in self.trainers),
                (self.collector, "begin", (stage, self.step, folder)),
            ]
        )
        await self._begin_critic(stage, resumed=folder is not None)
        if folder is not None:
            await self.session.ask_all(self.trainers, "restore", "policy", folder / "trainer")
            if self._critic_begun is not None:
                await self.session.ask_all(self.critics, "restore", "critic", folder / "critic")

    async def _begin_critic(self, stage: int, *, resumed: bool) -> None:
        """The critic begins a stage that has one, and waits during others. A checkpoint holds what it is in the last
        one that it has begun."""
        first = 0 if resumed else stage
        known = [index for index in range(first, stage + 1) if self.plan.stages[index].critic is not None]
        if not known:
            return
        if self._critic_begun is None and not resumed and stage > 0:
            await self._hand_over()
        self._critic_begun = known[-1]
        await self.session.ask_all(self.critics, "begin", "critic", known[-1])

    async def _hand_over(self) -> None:
        """A critic that begins after the first stage takes over what the policy has learnt."""
        folder = self.plan.folder / ".policy-for-critic"
        folder.mkdir(exist_ok=True)
        try:
            await self.session.ask_all(self.trainers, "save_pretrained", folder)
            await self.session.ask_all(self.critics, "load_pretrained", folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def finish(self) -> None:
        """The last checkpoint, and the policy for transformers."""
        await self.name_checkpoint(wait=True)
        await self._training()
        with self.console.phase("writing the policy"):
            async with Saving(self.plan.folder, self.plan.folder / POLICY) as folder:
                await self.session.ask_all(self.trainers, "save_pretrained", folder)

    def end(self, error: BaseException | None) -> None:
        """Trackers and callbacks hear that the run is over. While it fails already, what goes wrong here is only
        told."""
        endings: list[Callable[[], None]] = [self.observers.finish, partial(self.observers.tell, "run_end")]
        if isinstance(error, Exception):
            endings.insert(0, partial(self.observers.tell, "run_failed", error=error))
        for ending in endings:
            try:
                ending()
            except (UserError, RunError) as another:
                if error is None:
                    raise
                self.console.say(str(another), "red")

    async def stop(self) -> None:
        """Ends all members."""
        await self.session.stop()

    # ---- The verbs of the loop -----------------------------------------------------------------------------------

    async def batches(self) -> AsyncIterator[BatchRef]:
        """One batch a step, to the end of the last stage."""
        await self._evaluate_if_due()
        while self.step < self.plan.steps:
            stage = self.plan.stage_of(self.step)
            if self._begun != (index := self.plan.stages.index(stage)):
                await self._begin(index)
            started = time.monotonic()
            self.seconds = defaultdict(float)
            await self._generating()
            finished = not _computed_columns(stage, self.step) and not stage_columns(stage) & TEACHER
            ref, collected, metrics = await self._collected("next_batch", finished)
            self.observers.tell("rollout_end", step=self.step, metrics=dict(collected.metrics))
            await self._training()
            yield BatchRef(
                ref=ref,
                step=self.step,
                stage=stage,
                metrics={**collected.metrics, **metrics},
                seconds=collected.seconds,
                started=started,
                finished=finished,
            )

    async def _collected(self, method: str, *args: Any) -> Any:
        """What the collector gives for the step, however long that takes: it knows itself who keeps it waiting, but for
        engines that have failed."""
        while True:
            answer = await self.session.ask(
                self.collector, method, self.step, POLL_S, *args, deadline_s=POLL_S + self.session.deadline_s
            )
            if answer is not None:
                return answer
            if await self._mend():
                await self._training()
                await self._generating(new=True)

    async def reference(self, batch: BatchRef) -> BatchRef:
        """The batch with the columns that only the trainer, the critic and the teacher can compute, side by side."""
        teaching = asyncio.create_task(self._taught(batch))
        try:
            with self._timed("train"):
                columns = await self._computed(batch)
            with self._timed("teacher"):  # the wait for it alone
                return replace(batch, columns={**columns, **await teaching})
        finally:
            teaching.cancel()  # nothing happens unless something has failed

    async def _computed(self, batch: BatchRef) -> dict[str, list[Any]]:
        """The columns of the trainer and the critic."""
        calls: list[Call] = []
        first: dict[str, int] = {}  # a column comes from the first rank
        for name in sorted(_computed_columns(batch.stage, batch.step)):
            first[name] = len(calls)
            if name == "values":
                calls += [(critic, "values", (batch.ref, batch.step)) for critic in self.critics]
            else:
                asked = (batch.ref, FROM_TRAINER[name], batch.step)
                calls += [(trainer, "logprobs", asked) for trainer in self.trainers]
        answers = await self.session.gather(calls) if calls else []
        return {name: [answers[place]] for name, place in first.items()}

    async def _taught(self, batch: BatchRef) -> dict[str, list[Any]]:
        """References to the teacher's columns, in as many parts as it has engines."""
        if not stage_columns(batch.stage) & TEACHER:
            return {}
        parts = await self.session.ask_all(self.teachers, "score", batch.ref, top_k(batch.stage))
        return {name: [part[name] for part in parts] for name in parts[0]}

    async def advantage(self, batch: BatchRef) -> BatchRef:
        """The batch with advantages and weights, which it has already if nobody but the collector has a part in it."""
        if batch.finished:
            return batch
        parts = [(name, part) for name, column in batch.columns.items() for part in column]
        ref, metrics = await self.session.ask(
            self.collector, "finish", batch.ref, [name for name, _ in parts], *(part for _, part in parts)
        )
        return replace(batch, ref=ref, metrics={**batch.metrics, **metrics}, finished=True)

    async def update(self, batch: BatchRef) -> Report:
        """One or more optimizer steps of the policy and of the critic, side by side if they are on different ranks; and
        beside them, what the engines have measured."""
        asked = (batch.ref, batch.step, batch.stage.schedule.updates_per_batch)
        policy = self.trainers if _teaches_policy(batch.stage, batch.step) else []
        critic = self.critics if batch.stage.critic is not None else []
        *answers, (measured, self.engines.taken_out) = await self.session.gather(
            [
                *((trainer, "update", ("policy", *asked)) for trainer in policy),
                *((rank, "update", ("critic", *asked)) for rank in critic),
                (self.collector, "measured", ()),
            ]
        )
        of_policy: dict[str, float] = dict(answers[0]) if policy else {}
        of_critic: dict[str, float] = dict(answers[len(policy)]) if critic else {}
        times = [found.pop("train_seconds", 0.0) for found in (of_policy, of_critic)]
        self.seconds["train"] += sum(times) if self.critics is self.trainers else max(times)
        metrics = of_policy | {f"critic/{name}": value for name, value in of_critic.items() if name != "tokens"}
        return Report(version=batch.step + 1, batch=batch, metrics=measured | metrics)

    async def publish(self, version: int) -> None:
        """All engines generate with these weights from now on."""
        self.step = version
        await self._generating(new=True)

    async def _send(self) -> None:
        """The weights of this step to all engines. If one fails meanwhile, none has them for certain."""
        if not self.engines.members:
            return
        if not self.plan.placement.takes_turns and self.engines.failed:  # a transfer may not notice before its deadline
            await self._mend()
        with self._timed("publish"):
            await self.session.gather(
                [
                    *((trainer, "publish", (self.step,)) for trainer in self.trainers),
                    *((engine, "receive", (self.step,)) for engine in self.engines.members),
                ]
            )

    async def _mend(self) -> bool:
        """Starts engines again that have failed, and has the trainer meet them. Whether there were any."""
        if not self.engines.members or not await self.engines.mend(self.collector, self.step, self.turns):
            return False
        await self._meet()
        return True

    async def _training(self) -> None:
        """What comes next is for the trainer. Engines that share its GPUs can be started only before."""
        if not self.turns.training:
            await self._mend()
        with self._timed("turns"):
            await self._mending(self.turns.train)

    async def _generating(self, *, new: bool = False) -> None:
        """What comes next is for the engines. new: they have not had the weights of this step."""
        publishing = self.seconds["publish"]
        with self._timed("turns"):
            await self._mending(partial(self.turns.generate, self._send, new=new))
        self.seconds["turns"] -= self.seconds["publish"] - publishing

    async def _mending(self, change: Callable[[], Awaitable[None]]) -> None:
        """A change of turns; from its beginning, with all weights, after engines have failed on the way. They fail once
        a step, so this comes to an end."""
        while True:
            try:
                await change()
                return
            except RunError:
                if not await self._mend():
                    raise

    async def step_end(self, report: Report) -> None:
        """Metrics to trackers, callbacks and the terminal; then an evaluation and a checkpoint if they are due."""
        metrics = self._metrics(report)
        self.observers.log(report.version, metrics)
        self.console.step(report.version, report.batch.stage, metrics)
        self.observers.tell("step_end", step=report.version, metrics=metrics)
        await self.name_checkpoint(wait=False)
        await self._evaluate_if_due()
        every, last = self.plan.checkpoint.every, report.version == self.plan.steps
        if last or (every and report.version % every == 0):
            await self.save()

    def _metrics(self, report: Report) -> dict[str, float]:
        """All numbers of a step, and where its time went; what is none of the named is "other"."""
        total = time.monotonic() - report.batch.started
        spent = {**report.batch.seconds, **self.seconds}
        teacher = ["teacher"] if self.teachers else []
        turns = ["turns"] if self.plan.placement.takes_turns else []
        named = ["generate", "reward", *teacher, "train", *turns, "publish"]
        seconds = {name: spent.get(name, 0.0) for name in named}
        seconds |= {"other": max(total - sum(seconds.values()), 0.0), "step": total}
        tokens = report.batch.metrics.get("response_tokens", 0.0)
        return {
            "stage": float(self.plan.stages.index(report.batch.stage)),
            **report.batch.metrics,
            **report.metrics,
            "tokens_per_second": tokens / total if total else 0.0,
            **{f"seconds/{name}": value for name, value in seconds.items()},
        }

    def _timed(self, name: str) -> _Timed:
        return _Timed(self.seconds, name)

    # ---- Evaluation and checkpoints --------------------------------------------------------------------------------

    async def _evaluate_if_due(self) -> None:
        """At the start, every so many steps, at the end of each stage. A resumed run has been evaluated before."""
        every = self.plan.evaluation.every
        ends = {0, *(stage.last_step for stage in self.plan.stages)}
        if not every or (self.resumed and self.step == self.resumed.step):
            return
        if self.step % every and self.step not in ends:
            return
        await self._generating()
        with self.console.phase("evaluating"):
            metrics = await self._collected("evaluate")
        self.observers.log(self.step, metrics)
        self.console.evaluation(self.step, metrics)
        self.observers.tell("eval_end", step=self.step, metrics=metrics)

    async def save(self) -> None:
        """A checkpoint of this step. Trainers may still write it when this returns: see `name_checkpoint`."""
        await self.name_checkpoint(wait=True)
        await self._training()
        final = checkpoint.folder_of(self.plan.folder, self.step)
        with self.console.phase("saving a checkpoint"):
            async with contextlib.AsyncExitStack() as saving:
                folder = await saving.enter_async_context(Saving(self.plan.folder, final))
                *written, _ = await self.session.gather(
                    [
                        *((member, "save", (part, folder / name)) for member, part, name in self._to_save()),
                        (self.collector, "save", (folder,)),
                    ]
                )
                checkpoint.write_state(folder, {"step": self.step, "plugins": self.plan.plugin_set})
                if not all(written):
                    self._unnamed = (self.step, saving.pop_all())
                    return
        self._named(self.step)

    async def name_checkpoint(self, *, wait: bool) -> None:
        """Gives the checkpoint that is being written its name, if all ranks have written it; waits for them if asked
        to. A crash before leaves the one before it."""
        if self._unnamed is None:
            return
        step, saving = self._unnamed
        async with saving:
            self._unnamed = None
            calls: list[Call] = [(member, "written", (part, wait)) for member, part, _ in self._to_save()]
            if not all(await self.session.gather(calls)):
                self._unnamed = (step, saving.pop_all())
                return
        self._named(step)

    def _named(self, step: int) -> None:
        checkpoint.keep_newest(self.plan.folder, self.plan.checkpoint.keep)
        self.observers.tell("checkpoint_saved", step=step, path=checkpoint.folder_of(self.plan.folder, step))

    def _to_save(self) -> list[tuple[Member, Part, str]]:
        """Members with the part that they save, and its folder in a checkpoint."""
        critics = self.critics if self._critic_begun is not None else []
        return [
            *((trainer, "policy", "trainer") for trainer in self.trainers),
            *((critic, "critic", "critic") for critic in critics),
        ]


def _teaches_policy(stage: Stage, step: int) -> bool:
    """Whether the step does not only warm the critic up."""
    return step >= stage.first_step + stage.warmup_steps


def _computed_columns(stage: Stage, step: int) -> frozenset[str]:
    """Those that the trainer and the critic add to a batch. While there is one optimizer step a batch, a loss's old
    log-probabilities are the policy's own: no pass."""
    needed = needed_columns(stage.advantage) if stage.advantage is not None else frozenset()
    if _teaches_policy(stage, step):
        single = stage.schedule.updates_of_a_batch == 1
        needed |= loss_columns(stage) - ({"old_logprobs"} if single else set())
    return needed & {*FROM_TRAINER, "values"}


class _Timed:
    """Adds the seconds of a block to a counter."""

    def __init__(self, seconds: defaultdict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] += time.monotonic() - self._start


async def drive(plan: Plan, model: Path, resumed: Checkpoint | None, console: Console) -> None:
    """A whole run: start, loop, policy, end. Whatever happens, no process is left behind."""
    run = Run(plan, model, resumed, console)
    try:
        await run.start()
        await train(run)
        await run.finish()
    except BaseException as error:
        run.end(error)
        raise
    else:
        run.end(None)
    finally:
        await run.stop()


def refuse_finished(plan: Plan, found: Checkpoint) -> None:
    """A run that is over has nothing to resume. Raises `UserError`."""
    if found.step >= plan.steps and (plan.folder / POLICY).is_dir():
        raise UserError(
            f"run {plan.folder} is finished: {found.step} of {plan.steps} steps; its policy is in {POLICY}/"
        )
