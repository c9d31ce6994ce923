"""The long-lived processes of a run, as classes that Ray makes actors of: trainer ranks, engines, the collector.

Each builds its component. What they have in common is in `miles_core.cluster.process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray

from miles_core.cluster.engine_pool import EnginePool
from miles_core.cluster.process import MemberProcess, hooks_of, own_host
from miles_core.cluster.session import MemberDiedError
from miles_core.cluster.watch import watching
from miles_core.config.schema import CriticSection, Plan, TrainerSection
from miles_core.errors import RunError, UserError
from miles_core.lasting import lasting_imports
from miles_core.plugins import resolve
from miles_core.roles import BucketLayout, EngineContext, Measures, PauseMode, TrainerContext, Written
from miles_core.run import teaching
from miles_core.run.collector import Collected, Collector
from miles_core.run.objective import critic_stage, train_stage
from miles_core.sample import Batch, Completion, Request

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The environment variable that says which GPUs a process sees."""

Part = Literal["policy", "critic"]
"""What a trainer process trains."""


class TrainerMember(MemberProcess):
    """One rank of the policy's trainer, of the critic, or of both, if the critic has no ranks of its own."""

    def __init__(self, name: str, log: Path, plan: Plan, rank: int, parts: Sequence[Part]) -> None:
        super().__init__(name, log, plan)
        self.rank, self._classes = rank, {part: _class_of(plan, part) for part in parts}
        self.parts: dict[Part, Any] = {}
        self.contexts: dict[Part, TrainerContext] = {}
        self._writing: dict[Part, Written] = {}
        self.sender: Any = None
        self._engines: Sequence[Any] = ()

    def visible(self) -> str:
        """The GPUs that Ray lets this rank see."""
        return os.environ.get(VISIBLE, "")

    def enter(self) -> None:
        """Prepares the process and imports what it will train with."""
        self._enter()
        with lasting_imports():
            for ref in self._classes.values():
                resolve(ref)

    def address(self) -> str:
        """A free meeting point for the ranks, on rank 0's machine. The port is below those that systems give to whoever
        asks for any, because it is used only later."""
        host, draw = own_host(self.plan), random.SystemRandom()
        for _ in range(100):
            port = draw.randrange(15000, 32000)
            with contextlib.suppress(OSError), socket.create_server((host, port)):
                return f"tcp://{host}:{port}"
        raise RunError(f"no free port on {host} for the trainer's ranks")

    def start(self, part: Part, address: str, model: Path, reference: bool) -> None:
        """Builds the trainer or the critic, and its model."""
        plan, section = self.plan, self._section
        self.contexts[part] = TrainerContext(
            model=model,
            rank=self.rank,
            world_size=section.world_size,
            address=address,
            gpus=int(section.gpus > 0),
            threads=section.threads,
            seed=plan.seed,
            reference=reference,
            timeout_s=plan.cluster.deadline_s,
            hooks=hooks_of(plan, "trainer"),
            role=part,
            verify=plan.publish.verify == "checksum",
            layout=plan.placement.layout,
        )
        self.parts[part] = resolve(self._classes[part])(_first_options(plan, part), self.contexts[part])
        self.parts[part].start()

    @property
    def _section(self) -> TrainerSection | CriticSection:
        """That says how many ranks there are like this one."""
        own = self.plan.critic_section if "policy" not in self._classes else None
        return own or self.plan.trainer_section

    def begin(self, part: Part, stage: int) -> None:
        """A stage starts."""
        made = train_stage if part == "policy" else critic_stage
        self.parts[part].begin(made(self.plan.stages[stage]))

    def load_pretrained(self, folder: Path) -> None:
        """The critic takes over the weights of a policy."""
        self.parts["critic"].load_pretrained(folder)

    def open_sync(self, engines: Sequence[Any]) -> tuple[str, Sequence[BucketLayout]]:
        """Builds the sender for these actors, anew if they have changed. The meeting point (of rank 0) and what will be
        sent."""
        if self.sender is not None:
            self.sender.close()
        assert self.plan.sync is not None
        self._engines = engines
        self.sender = resolve(self.plan.sync.spec.ref)(self.contexts["policy"], len(engines))
        return self.sender.open() if self.rank == 0 else "", self.parts["policy"].layout()

    def connect_sync(self) -> None:
        """Meets the engines."""
        with self._watching():
            self.sender.connect()

    def _watching(self) -> contextlib.AbstractContextManager[None]:
        """While this rank waits for engines: if one cannot go on, none waits for it any more. Rank 0 sees to it."""
        return watching(self._engines, self.sender.give_up) if self.rank == 0 else contextlib.nullcontext()

    def give_up_sync(self) -> None:
        """Ends the waits of other ranks and of engines, in a meeting with an engine that has failed. Of rank 0."""
        if self.sender is not None:
            self.sender.give_up()

    def publish(self, version: int) -> None:
        """Sends the weights; returns when every engine has them. If it fails, the meeting is over."""
        context, buckets = self.contexts["policy"], self.parts["policy"].export()
        try:
            with self._watching():
                self.sender.send(buckets)
        except RunError:
            self.sender.close()  # whoever still waits for this rank hears of it
            for _ in buckets:  # other ranks go on with what is a collective
                pass
            raise
        context.hooks.weights_published(context=context, version=version)

    def logprobs(self, batch: Batch, which: Literal["policy", "reference"], step: int) -> Any:
        """A token column of the policy or the reference, from rank 0."""
        return self.parts["policy"].logprobs(batch, which, step)

    def values(self, batch: Batch, step: int) -> Any:
        """The token column of the critic, from rank 0."""
        return self.parts["critic"].values(batch, step)

    def update(self, part: Part, batch: Batch, step: int, passes: int) -> Mapping[str, float]:
        """Trains on a batch."""
        metrics: Mapping[str, float] = self.parts[part].update(batch, step, passes)
        return metrics

    def sleep(self) -> None:
        """Gives its GPU memory back."""
        for trained in self.parts.values():
            trained.sleep()

    def wake(self) -> None:
        """Ends a sleep."""
        for trained in self.parts.values():
            trained.wake()

    def save(self, part: Part, folder: Path) -> bool:
        """Everything that `restore` needs. Whether it is written already."""
        written: Written | None = self.parts[part].save(folder)
        if written is not None:
            self._writing[part] = written
        return written is None

    def written(self, part: Part, wait: bool) -> bool:
        """Whether all ranks have written what the last `save` began; waits for that if asked to."""
        if part in self._writing and self._writing[part](wait):
            del self._writing[part]
        return part not in self._writing

    def restore(self, part: Part, folder: Path) -> None:
        """The opposite of `save`."""
        self.parts[part].restore(folder)

    def save_pretrained(self, folder: Path) -> None:
        """The policy for transformers."""
        self.parts["policy"].save_pretrained(folder)

    def close(self) -> None:
        """Ends what it has started."""
        if self.sender is not None:
            self.sender.close()
        for trained in self.parts.values():
            trained.stop()


def _class_of(plan: Plan, part: Part) -> str:
    """ "module:Class" of what trains a part."""
    trained = plan.trainer if part == "policy" else plan.critic
    assert trained is not None
    ref = trained.spec.ref if part == "policy" else trained.spec.critic
    assert ref is not None
    return ref


def _first_options(plan: Plan, part: Part) -> Any:
    """What the trainer or the critic is built with: the options of the first stage that has it."""
    if part == "policy":
        return plan.stages[0].trainer.options
    return next(stage.critic.trainer.options for stage in plan.stages if stage.critic)


Finished = tuple[str, list[Completion] | BaseException]
"""A request's id, and its completions or why there are none."""


class EngineMember(MemberProcess):
    """One engine. Requests come by `submit`, results leave by `take`, many in one answer."""

    def __init__(self, name: str, log: Path, plan: Plan, index: int, model: Path) -> None:
        super().__init__(name, log, plan)
        self.index, self.model = index, model
        self.engine: Any = None
        self.receiver: Any = None
        self.finished: list[Finished] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.asleep = False
        self.lost: MemberDiedError | None = None
        self.ended = asyncio.Event()

    def _lose(self, reason: str) -> None:
        """The engine cannot go on: from now on whoever asks hears why. Called in any thread."""
        self.lost = self.lost or MemberDiedError(reason)
        self.loop.call_soon_threadsafe(self.news.set)
        self.loop.call_soon_threadsafe(self.ended.set)

    def _failure(self, error: Exception, method: str) -> UserError | RunError:
        return self.lost or super()._failure(error, method)

    async def see(self, gpus: str) -> None:
        """The GPUs of the trainer's ranks with which it is colocated; before anything looks for GPUs."""
        os.environ[VISIBLE] = gpus

    async def enter(self) -> None:
        """Prepares the process and imports the engine."""
        assert self.plan.engine is not None
        self._enter()
        self.news, self.loop = asyncio.Event(), asyncio.get_running_loop()
        with lasting_imports():
            self._build = resolve(self.plan.engine.spec.ref)

    async def start(self) -> None:
        """Builds the engine and brings it up."""
        plan, self.changing = self.plan, asyncio.Lock()
        assert plan.engine is not None
        assert plan.engine_section is not None
        self.context = EngineContext(
            model=self.model,
            index=self.index,
            gpus=plan.engine_section.gpus,
            threads=plan.engine_section.threads,
            dtype=plan.model.dtype,
            max_tokens=plan.model.max_tokens,
            seed=plan.seed,
            folder=self.log.parent,
            hooks=hooks_of(plan, "rollout"),
            verify=plan.publish.verify == "checksum",
            sleeps=plan.placement.takes_turns,
            lost=self._lose,
        )
        self.engine = self._build(plan.engine.options, self.context)
        await self.engine.start()

    async def ping(self) -> None:
        """Answers, if the engine can go on."""
        if self.lost is not None:
            raise self.lost

    async def until_lost(self) -> None:
        """Answers once the engine cannot go on."""
        await self.ended.wait()

    async def connect_sync(
        self, address: str, gone: frozenset[int], engines: int, layout: Sequence[BucketLayout]
    ) -> None:
        """Meets the trainer, again if engines have changed; after the end of a meeting that was given up."""
        async with self.changing:
            await self._part()
            context = dataclasses.replace(self.context, gone=gone)
            assert self.plan.sync is not None
            self.receiver = resolve(self.plan.sync.spec.receiver)(context, engines, address, layout)
            await asyncio.to_thread(self.receiver.connect)

    async def receive(self, version: int) -> None:
        """Receives the weights of `version` while generation is paused, or while only weights are awake. If it fails,
        the meeting is over, and nothing generates until other weights have come whole."""
        mode: PauseMode = self.plan.publish.mode
        async with self.changing:
            if not self.asleep:
                await self.engine.pause(mode)
            try:
                await asyncio.to_thread(self.receiver.receive, self.engine.load)
            except RunError:
                await self._part()
                raise
            self.engine.set_version(version)
            if not self.asleep:
                await self.engine.resume()

    async def _part(self) -> None:
        """Leaves the meeting with the trainer."""
        if self.receiver is not None:
            receiver, self.receiver = self.receiver, None
            await asyncio.to_thread(receiver.close)

    async def sleep(self) -> None:
        """Gives its GPU memory back when nothing generates any more; later requests wait. Once is enough."""
        async with self.changing:
            await self.engine.sleep()
            self.asleep = True

    async def wake(self, part: Literal["weights", "all"]) -> None:
        """Ends a sleep, or only so far that it can receive weights."""
        async with self.changing:
            await self.engine.wake(part)
            self.asleep = part != "all"

    async def submit(self, requests: Sequence[Request]) -> None:
        """Requests that enter the engine together."""
        task = asyncio.create_task(self._run(requests))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(self, requests: Sequence[Request]) -> None:
        left = {request.id for request in requests}
        try:
            async for name, completions in self.engine.generate(requests):
                left.discard(name)
                self.finished.append((name, completions))
                self.news.set()
        except Exception as error:
            reason = self._failure(error, "generate")
            self.finished.extend((name, reason) for name in left)
            self.news.set()

    async def abort(self, ids: Sequence[str]) -> None:
        """Ends requests that nobody waits for any more."""
        await self.engine.abort(ids)

    async def take(self, patience_s: float) -> tuple[list[Finished], float]:
        """What has finished since the last call, after waiting up to `patience_s` for something; and the seconds that
        the engine has computed in all."""
        if not self.finished and self.lost is None:
            self.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), patience_s)
        await self.ping()
        taken, self.finished = self.finished, []
        return taken, self.engine.busy_seconds

    async def measure(self) -> Measures:
        """What the engine has measured since the last call, if it does."""
        measure: Callable[[], Awaitable[Measures]] | None = getattr(self.engine, "measure", None)
        return {} if measure is None else await measure()

    async def close(self) -> None:
        """Ends what it has started."""
        if self.receiver is not None:
            self.receiver.close()
        if self.engine is not None:
            await self.engine.stop()


class TeacherMember(MemberProcess):
    """One of the engines that serve the teacher. It scores its share of each batch."""

    def __init__(self, name: str, log: Path, plan: Plan, index: int, model: Path, vocabulary: int | None) -> None:
        super().__init__(name, log, plan)
        assert plan.teacher is not None
        self.teacher = plan.teacher
        self.index, self.model, self.vocabulary = index, model, vocabulary
        self.engine: Any = None

    async def enter(self) -> None:
        """Prepares the process and imports the engine."""
        self._enter()
        with lasting_imports():
            self._build = resolve(self.teacher.engine.spec.ref)

    async def start(self) -> None:
        """Builds the engine and brings it up, with the weights of the teacher's folder. Callbacks do not hear of it."""
        section = self.teacher.engine_section
        context = EngineContext(
            model=self.model,
            index=self.index,
            gpus=section.gpus,
            threads=section.threads,
            dtype=self.teacher.section.dtype,
            max_tokens=self.plan.model.max_tokens,
            seed=self.plan.seed,
            folder=self.log.parent,
            frozen=True,
        )
        self.engine = self._build(self.teacher.engine.options, context)
        await self.engine.start()

    async def score(self, batch: Batch, top_k: int) -> dict[str, Any]:
        """References to the teacher's columns of this member's share of the tokens."""
        share = teaching.shares(batch, self.teacher.engine_section.count)[self.index]
        scores = await self.engine.score(teaching.score_requests(batch, share, top_k))
        columns = teaching.columns(batch, share, scores, top_k, self.vocabulary)
        return {name: ray.put(column) for name, column in columns.items()}

    async def close(self) -> None:
        """Ends what it has started."""
        if self.engine is not None:
            await self.engine.stop()


@contextlib.contextmanager
def _remarks() -> Iterator[list[str]]:
    """Collects the warnings that are logged meanwhile by loggers of Miles, which are named like its packages."""
    remarks: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: remarks.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: record.name.startswith("miles"))
    logging.getLogger().addHandler(handler)
    try:
        yield remarks
    finally:
        logging.getLogger().removeHandler(handler)


class CollectorMember(MemberProcess):
    """The collector: data, rollouts, rewards, filters, advantages."""

    def __init__(self, name: str, log: Path, plan: Plan, model: Path, engines: Sequence[tuple[str, Any, Path]]) -> None:
        super().__init__(name, log, plan)
        self.model, self.engines = model, engines
        self.collector: Any = None
        self.pool: EnginePool | None = None
        self.evaluation: asyncio.Task[dict[str, float]] | None = None

    async def enter(self) -> list[str]:
        """Prepares the process and what needs no engine: all that can be wrong with the data is found here.

        Returns what Miles and its plugins have to remark on the data.
        """
        self._enter()
        self.pool = EnginePool(self.engines, self.plan.cluster.deadline_s) if self.engines else None
        with _remarks() as remarks, lasting_imports():
            self.collector = await asyncio.to_thread(Collector, self.plan, self.model, self.pool)
        return remarks

    async def go_without(self, dead: Mapping[str, BaseException]) -> dict[str, BaseException]:
        """No more is asked of engines that are dead. All that were taken out since the last call, and why."""
        assert self.pool is not None
        return self.pool.go_without(dead)

    async def come_back(self, engines: Sequence[tuple[str, Any, Path]]) -> None:
        """These were started in the place of engines that were taken out."""
        assert self.pool is not None
        self.pool.come_back(engines)

    async def begin(self, stage: int, step: int, folder: Path | None) -> None:
        """A stage starts, or goes on from a checkpoint."""
        await self.collector.begin(stage, step, folder)

    async def next_batch(
        self, step: int, patience_s: float, finish: bool
    ) -> tuple[Any, Collected, dict[str, float]] | None:
        """A reference to the batch of `step`, what there is to say of it, and what `finish` says if it needs no other
        columns and is asked for; None if the batch is not complete yet."""
        collected = await self.collector.next_batch(step, patience_s)
        if collected is None:
            return None
        batch, metrics = await self._finished(collected.batch, {}) if finish else (collected.batch, {})
        return ray.put(batch), collected.without_batch(), metrics

    async def finish(self, batch: Batch, names: Sequence[str], *columns: Any) -> tuple[Any, dict[str, float]]:
        """The batch with the columns of the trainer and others, its advantages and its weights. Columns of one name
        stand end to end."""
        parts: dict[str, list[Any]] = {}
        for name, part in zip(names, columns, strict=True):
            parts.setdefault(name, []).append(part)
        joined = {name: found[0] if len(found) == 1 else np.concatenate(found) for name, found in parts.items()}
        finished, metrics = await self._finished(batch, joined)
        return ray.put(finished), metrics

    async def _finished(self, batch: Batch, columns: Mapping[str, Any]) -> tuple[Batch, dict[str, float]]:
        """Beside what still generates."""
        finished: tuple[Batch, dict[str, float]] = await asyncio.to_thread(self.collector.finish, batch, columns)
        return finished

    async def measured(self) -> tuple[dict[str, float], bool]:
        """What the engines measured until the last batch was complete; and whether one was taken out that `go_without`
        has not told of."""
        return await self.collector.measured(), self.pool is not None and self.pool.untold

    async def evaluate(self, step: int, patience_s: float) -> dict[str, float] | None:
        """Metrics of an evaluation, which the first call of a step begins; None if it is not complete yet."""
        if self.evaluation is None:
            self.evaluation = asyncio.create_task(self.collector.evaluate(step))
        done, _ = await asyncio.wait([self.evaluation], timeout=patience_s)
        if not done:
            self.collector.check_rollout()
            return None
        evaluation, self.evaluation = self.evaluation, None
        return evaluation.result()

    async def save(self, folder: Path) -> None:
        """Everything that `begin` needs to go on."""
        self.collector.save(folder)

    async def close(self) -> None:
        """Ends the reward workers."""
        if self.collector is not None:
            await asyncio.to_thread(self.collector.close)
