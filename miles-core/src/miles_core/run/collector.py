"""The collector: a stream of scored groups, cut into batches, never staler than the run allows.

Let B be `prompts_per_step`, k `max_staleness`, and v the version that trains next. Groups are begun only while no more
than (v + k + 1) B of the stage's groups are used up, buffered or under way. A group that was begun at version b is
trained on at version b + k at the latest; so the batch of version v is cut off only when no later batch would have to
hold more than B groups for that. Thus no sample lags more than k versions, nothing is thrown away for being stale, and
with k = 0 the loop is synchronous. What a filter drops is counted and replaced.

With k = 0 groups are begun in waves: replacements only when the whole wave is scored. Requests then reach idle engines
together, and a run gives the same numbers every time, to the last bit.

With `over_sample` more groups are begun than a batch needs, and those that are done first make it, so that nobody waits
for the slowest. What would be too stale for the next batch is thrown back (`miles_core.run.progress`) and counted.
Which groups these are is a matter of time, so such a run is not the same twice; no prompt is lost or trained twice.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles_core.config.schema import Plan, Stage
from miles_core.config.traits import loss_columns
from miles_core.errors import RunError
from miles_core.roles import Filter
from miles_core.run import buffer
from miles_core.run.advantages import apply_advantage
from miles_core.run.kl import KLControl
from miles_core.run.producer import Clock, Engines, Producer, built
from miles_core.run.progress import Progress
from miles_core.run.scoring import Scorer
from miles_core.run.tokenizers import load_tokenizer
from miles_core.run.weights import aggregate
from miles_core.sample import Batch, Group, Prompt

DROP_LIMIT = 50
"""Filters may drop this many batches' worth of groups for one batch before the run is given up."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A batch, its metrics, and the seconds of the wait for it that went to generation and to rewards."""

    batch: Batch | None
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]

    def without_batch(self) -> Collected:
        """The same, to be sent beside a reference to the batch."""
        return replace(self, batch=None)


class Collector:
    """Runs on the event loop of its actor. `begin` a stage, then `next_batch` and `finish` for each of its steps."""

    def __init__(self, plan: Plan, model: Path, engines: Engines | None) -> None:
        self.plan, self.engines = plan, engines
        self.tokenizer = load_tokenizer(model)
        self.clock = Clock()
        self._scorers: dict[int, Scorer] = {}
        self._measuring: asyncio.Task[dict[str, float]] | None = None
        self._changed = asyncio.Event()
        # All at once, so that what is wrong with the data of a later stage does not come out after hours.
        self._producers = [self._producer(stage) for stage in range(len(plan.stages))]
        self._filters: list[list[Filter]] = [[built(one) for one in stage.filters] for stage in plan.stages]
        evaluated = self._evaluation_stage()
        self._evaluator = None if evaluated is None else self._producer(evaluated, evaluation=True)

    # ---- Stages ------------------------------------------------------------------------------------------------

    async def begin(self, stage: int, step: int, folder: Path | None = None) -> None:
        """Starts a stage, or goes on with it from what `save` wrote into `folder`."""
        self.index, self.stage = stage, self.plan.stages[stage]
        keep = {stage, self._evaluation_stage()}
        for index in [index for index in self._scorers if index not in keep]:
            self._scorers.pop(index).close()
        self.producer, self.filters = self._producers[stage], self._filters[stage]
        self.producer.scorer = self._scorer(stage)
        done = step - self.stage.first_step
        self.progress = Progress(version=done, used=done * self.stage.schedule.prompts_per_step)
        self.kl = KLControl.of(self.stage)
        if folder is not None:
            self._restore(folder)

    def _producer(self, index: int, *, evaluation: bool = False) -> Producer:
        """Of one stage; the reward workers are given to it when they are needed."""
        return Producer(
            self.plan,
            self.plan.stages[index],
            self.tokenizer,
            self.engines,
            self.clock,
            split="eval" if evaluation else "train",
            temperature=self.plan.evaluation.temperature if evaluation else None,
        )

    def _scorer(self, stage: int) -> Scorer | None:
        """The reward workers of a stage, started when they are first needed."""
        rewards = self.plan.stages[stage].rewards
        if stage not in self._scorers and rewards and _scores(self.plan.stages[stage]):
            workers = max(1, min(8, (os.cpu_count() or 1) // 2))
            self._scorers[stage] = Scorer(rewards, self.plan.plugin_set, workers)
        return self._scorers.get(stage)

    def close(self) -> None:
        """Ends the reward workers."""
        for scorer in self._scorers.values():
            scorer.close()

    # ---- Groups --------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Begins as many groups as may be under way."""
        progress, schedule = self.progress, self.stage.schedule
        if schedule.max_staleness == 0 and not schedule.over_sample and progress.running:
            return
        needed = schedule.prompts_per_step * min(progress.version + schedule.max_staleness + 1, schedule.steps)
        if needed <= progress.used:
            return
        for _ in range(needed + schedule.over_sample - progress.used - len(progress.begun)):
            prompt = self.producer.draw(progress.draw())
            progress.begun[prompt.id] = progress.version
            progress.tasks[prompt.id] = asyncio.create_task(self._make(prompt, schedule.samples_per_prompt))

    async def _make(self, prompt: Prompt, count: int) -> None:
        progress, task = self.progress, asyncio.current_task()
        assert task is not None
        try:
            progress.generating.add(task)
            try:
                group = await self.producer.generate(prompt, count)
            finally:
                progress.generating.discard(task)
            group = await self.producer.score(group)
            if task not in progress.unwanted:
                self._judge(prompt.id, group)
                self._fill()
        except (Exception, asyncio.CancelledError) as error:  # whatever it is, somebody waits for this group
            if task not in progress.unwanted:
                progress.error = progress.error or error
        self._changed.set()

    def _judge(self, position: int, group: Group) -> None:
        """Keeps a scored group or drops it."""
        progress, size = self.progress, self.stage.schedule.prompts_per_step
        failed = sum(sample.status == "failed" for sample in group)
        progress.failed += failed
        progress.failed_in_a_row = progress.failed_in_a_row + 1 if failed == len(group) else 0
        if progress.failed_in_a_row >= size:
            raise self._all_failed(group)
        if all(one.keep(group) for one in self.filters):
            progress.done[position] = group
            return
        progress.drop(position)
        if progress.dropped > DROP_LIMIT * size:
            names = ", ".join(one.spec.name for one in self.stage.filters)
            raise RunError(
                f"the filters ({names}) have dropped {progress.dropped} groups since the last batch of {size}, so the "
                "next one cannot be filled: the task is too easy or too hard for the policy, or the rewards are all "
                "the same"
            )

    def _all_failed(self, group: Group) -> RunError:
        scorer = self._scorers.get(self.index)
        return RunError(
            f"every sample of {self.progress.failed_in_a_row} groups in a row failed to be scored, the last one with: "
            f"{group[0].error}",
            cause=scorer.last_traceback if scorer else None,
        )

    # ---- Batches -------------------------------------------------------------------------------------------------

    async def next_batch(self, step: int, patience_s: float) -> Collected | None:
        """The batch that version `step` trains on; None if it is not complete after `patience_s`."""
        progress = self.progress
        progress.version = step - self.stage.first_step
        before, busy = self.clock.read(), self._busy()
        self._fill()  # also when the batch is there already: what it makes room for is generated while it is trained on
        try:
            async with asyncio.timeout(patience_s):
                while not self._ready():
                    self._changed.clear()
                    self._fill()
                    if progress.error is None and not self._ready():
                        await self._changed.wait()
                    if progress.error is not None:
                        raise progress.error
        except TimeoutError:
            self.check_rollout()
            return None
        seconds = {what: value - before[what] for what, value in self.clock.read().items()}
        seconds["generate"] = min(seconds["generate"], self._busy() - busy)
        return self._take(step, seconds)

    def check_rollout(self) -> None:
        """Engines and rewards have deadlines of their own; this is that of a rollout which waits for something else.
        Raises `RunError`."""
        limit = self.plan.cluster.deadline_s
        if self.clock.idle_seconds > limit:
            raise RunError(
                f"rollout {self.stage.rollout.spec.name} has asked neither an engine nor a reward for anything for "
                f"{limit:g} s (cluster.deadline_s), and has not given the samples of these prompts: "
                f"{', '.join(map(str, self.progress.running)) or 'those of an evaluation'}"
            )

    def _busy(self) -> float:
        return max(self.engines.busy_seconds) if self.engines else math.inf

    def _ready(self) -> bool:
        """Whether B groups are done, among them enough of the old ones: with those that were begun at version b or
        earlier, the batches from this one to that of version b + k must come to an end."""
        progress, schedule = self.progress, self.stage.schedule
        if len(progress.done) < schedule.prompts_per_step or schedule.over_sample:
            return len(progress.done) >= schedule.prompts_per_step
        for later in range(schedule.max_staleness + 1):
            version = progress.version + later - schedule.max_staleness
            old = [group for group, begun in progress.begun.items() if begun <= version]
            done = sum(group in progress.done for group in old)
            if done < len(old) - later * schedule.prompts_per_step:
                return False
        return True

    def _take(self, step: int, seconds: Mapping[str, float]) -> Collected:
        """Cuts off a batch: the groups begun at the oldest versions, then in the order of the data, or in that in which
        they were done if too many are begun."""
        progress, schedule = self.progress, self.stage.schedule
        done = list(progress.done) if schedule.over_sample else sorted(progress.done)
        chosen = sorted(sorted(done, key=progress.begun.__getitem__)[: schedule.prompts_per_step])
        samples = [sample for group in progress.hand_over(chosen) for sample in group]
        if schedule.over_sample:
            progress.throw_back(progress.version + 1 - schedule.max_staleness)
        scorer = self._scorer(self.index)
        batch = Batch.pack(
            samples,
            temperature=self.stage.sampling.temperature or 1.0,
            reward_weights=scorer.reward_weights if scorer else {},
        )
        if "staleness" in loss_columns(self.stage):
            lag = np.where(batch["versions"] >= 0, step - batch["versions"], 0)
            batch = batch.with_columns(staleness=lag.astype(np.float32))
        metrics = {**group_metrics([samples]), **self._staleness(batch, step)}
        if not _scores(self.stage):
            del metrics["reward"]  # nobody gave one
        counts = progress.counts()
        if not schedule.over_sample:
            del counts["oversampled"]
        if self.engines:
            self._measuring = asyncio.create_task(self._measure(self.engines))
        return Collected(batch=batch, metrics={**metrics, **counts}, seconds=seconds)

    async def _measure(self, engines: Engines) -> dict[str, float]:
        return {f"engine/{name}": number for name, number in (await engines.measure()).items()}

    async def measured(self) -> dict[str, float]:
        """What the engines measured between the last two batches, which they were asked when the last was complete."""
        return await self._measuring if self._measuring is not None else {}

    def _staleness(self, batch: Batch, step: int) -> dict[str, float]:
        """Versions that the trained tokens lag behind."""
        made = batch["versions"][batch["mask"] & (batch["versions"] >= 0)]
        if not len(made):
            return {}
        return {"staleness/mean": float(step - made.mean()), "staleness/max": float(step - made.min())}

    def finish(self, batch: Batch, columns: Mapping[str, NDArray[Any]]) -> tuple[Batch, dict[str, float]]:
        """The batch with the trainer's columns, its advantages and its weights. Runs in a thread."""
        batch, advantage = batch.with_columns(**columns), self.stage.advantage
        if self.kl is not None:
            batch, advantage = self.kl.apply(batch, advantage)
        batch = apply_advantage(batch, advantage)
        batch = aggregate(batch, self.stage.loss_section, self.stage.schedule.minibatches)
        metrics = {"trained_tokens": float(np.count_nonzero(batch["mask"])), **_explained(batch), **_taught(batch)}
        return batch, metrics | (self.kl.learn(batch) if self.kl is not None else {})

    # ---- Evaluation ------------------------------------------------------------------------------------------------

    def _evaluation_stage(self) -> int | None:
        """The last stage that generates says what is evaluated, and how."""
        if not self.plan.evaluation.every:
            return None
        return [index for index, stage in enumerate(self.plan.stages) if stage.rollout.spec.engine][-1]

    async def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the weights of version `step` on the first prompts of the held-out split."""
        index, section = self._evaluation_stage(), self.plan.evaluation
        assert index is not None
        assert self._evaluator is not None
        self._evaluator.scorer = self._scorer(index)
        size = self._evaluator.source.size
        count = section.prompts if size is None else min(section.prompts, size)
        prompts = [self._evaluator.draw(position) for position in range(count)]
        made = await asyncio.gather(*(self._evaluator.make(prompt, section.samples_per_prompt) for prompt in prompts))
        failed = sum(sample.status == "failed" for group in made for sample in group)
        return {f"eval/{name}": value for name, value in {**group_metrics(made), "failed": float(failed)}.items()}

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Where the data stands and what is buffered; what is under way is to be made again."""
        progress = self.progress
        state = progress.state()
        buffer.save(
            folder,
            state if self.kl is None else {**state, "kl_coef": self.kl.coefficient},
            {group: (progress.begun[group], samples) for group, samples in progress.done.items()},
        )

    def _restore(self, folder: Path) -> None:
        state, groups = buffer.load(folder, self.producer.draw)
        self.progress.restore(state, groups)
        if self.kl is not None:
            self.kl.coefficient = state["kl_coef"]


def _explained(batch: Batch) -> dict[str, float]:
    """How much of the returns the critic knew: 1 - variance(returns - values) / variance(returns) over trained tokens;
    0 is what one number for all would know. Left out without a critic, and where all returns are equal."""
    if "values" not in batch or "returns" not in batch:
        return {}
    returns, values = batch["returns"][batch["mask"]], batch["values"][batch["mask"]]
    if not len(returns) or not returns.var():
        return {}
    return {"critic/explained_variance": float(1 - (returns - values).var() / returns.var())}


def _taught(batch: Batch) -> dict[str, float]:
    """How far the policy that wrote the tokens is from the teacher, where there is one: the mean of log rollout - log
    teacher, an estimate of KL(rollout || teacher)."""
    written = batch["mask"] & (batch["versions"] >= 0)
    if "teacher_logprobs" not in batch or not written.any():
        return {}
    difference = batch["rollout_logprobs"][written].astype(np.float64) - batch["teacher_logprobs"][written]
    return {"teacher_kl": float(difference.mean())}


def _scores(stage: Stage) -> bool:
    """Whether anything comes of the rewards: what is read from the data and read by no advantage is not scored."""
    return bool(stage.rewards) and (stage.advantage is not None or stage.rollout.spec.engine)


def group_metrics(groups: list[Group]) -> dict[str, float]:
    """Means over samples: reward and its parts, response length, shares of truncated and failed samples."""
    samples = [sample for group in groups for sample in group]
    count = max(len(samples), 1)
    names = sorted({name for sample in samples for name in sample.rewards})
    lengths = [len(sample.response) for sample in samples]
    return {
        "reward": sum(sample.reward or 0.0 for sample in samples) / count,
        **{f"reward/{name}": sum(sample.rewards.get(name, 0.0) for sample in samples) / count for name in names},
        "response_tokens": float(sum(lengths)),
        "response_length": sum(lengths) / count,
        "truncated": sum(sample.status == "truncated" for sample in samples) / count,
    }
