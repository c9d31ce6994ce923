"""A collector whose engines, data and rewards are the test's: it says in which order what is finished."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from miles_core.config import schema
from miles_core.roles import DataContext
from miles_core.run.collector import Collected, Collector
from miles_core.run.filters import NonzeroStd
from miles_core.run.rollouts import SingleTurn
from miles_core.sample import Completion, Group, IntArray, Prompt, Sampling
from miles_core.specs import DataSourceSpec, EngineSpec, FilterSpec, LossSpec, RolloutSpec, TrainerSpec


class Counting:
    """A data source: the prompt of position n is the token n + 1, and its metadata are nothing for JSON."""

    size = None

    def __init__(self, options: None, context: DataContext) -> None:
        self.position = 0

    def next(self) -> Prompt:
        position, self.position = self.position, self.position + 1
        tokens = np.array([position + 1], np.int32)
        return Prompt(id=position, tokens=tokens, text="", answer=str(position), metadata={"set": {position}})

    def seek(self, position: int) -> None:
        self.position = position


class Engines:
    """Every request waits until the test finishes it. version: of the weights, which the test sets too.

    finish: gives a prompt its completions, whose first token is of the version at which it was asked for and whose
    last is of the version now. left: prompts that nobody waited for any more.
    """

    def __init__(self) -> None:
        self.version = 0
        self.aborted = 0
        self.busy_seconds = [0.0]
        self.measures: dict[str, float] = {}
        self.waiting: dict[int, asyncio.Future[list[Completion]]] = {}
        self.asked: list[int] = []
        self.left: list[int] = []
        self.on_ask: Callable[[], None] = lambda: None

    async def measure(self) -> dict[str, float]:
        measures, self.measures = self.measures, {}
        return measures

    async def generate(self, tokens: IntArray, seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        group, began = int(tokens[0]) - 1, self.version
        self.asked.append(group)
        self.waiting[group] = asyncio.get_running_loop().create_future()
        self.on_ask()
        try:
            await self.waiting[group]
        except asyncio.CancelledError:
            self.left.append(group)
            self.waiting.pop(group, None)
            raise
        versions = np.array([began, self.version], np.int32)
        # What a seed gives does not depend on when it is asked for.
        return [
            Completion(
                tokens=np.array([seed % 90, seed % 7], np.int32),
                logprobs=np.array([-(seed % 10), -1.0], np.float32),
                versions=versions,
                status="completed",
            )
            for seed in seeds
        ]

    def finish(self, group: int) -> None:
        self.waiting.pop(group).set_result([])


class Scores:
    """Rewards: the sample's place in its group, all equal for the groups of `equal`, failed for those of `failed`."""

    last_traceback = "Traceback of the reward"
    reward_weights: Mapping[str, float] = {"toy": 1.0}

    def __init__(self, equal: Collection[int] = (), failed: Collection[int] = ()) -> None:
        self.equal, self.failed = equal, failed

    async def score(self, group: Group) -> Group:
        def reward(sample: Any) -> Any:
            if sample.group in self.failed:
                return replace(sample, reward=0.0, status="failed", error="toy: ValueError: no")
            value = 0.5 if sample.group in self.equal else sample.index / 3
            return replace(sample, reward=value, rewards={"toy": value})

        return [reward(sample) for sample in group]

    def close(self) -> None: ...


def plan(
    *,
    batch: int = 2,
    samples: int = 2,
    steps: int = 4,
    staleness: int = 0,
    over_sample: int = 0,
    filtered: bool = False,
    **cluster: Any,
) -> schema.Plan:
    """One stage of single-turn rollouts, with the filter nonzero-std if `filtered`."""

    def component(kind: Any, name: str, ref: str = "test:x") -> schema.Component[Any]:
        return schema.Component(spec=kind(name=name, ref=ref, summary="x"), plugin="test")

    trainer = component(TrainerSpec, "none")
    stage = schema.Stage(
        name="train",
        first_step=0,
        schedule=schema.Schedule(
            steps=steps,
            prompts_per_step=batch,
            samples_per_prompt=samples,
            max_staleness=staleness,
            over_sample=over_sample,
        ),
        sampling=Sampling(max_new_tokens=2),
        data=component(DataSourceSpec, "counting", "test:counting"),
        rollout=component(RolloutSpec, "single-turn", "test:single_turn"),
        rewards=(),
        filters=(component(FilterSpec, "nonzero-std", "test:nonzero_std"),) if filtered else (),
        advantage=None,
        loss=schema.Component(spec=LossSpec(name="none", ref="test:x", summary="x"), plugin="test"),
        loss_section=schema.LossSection(name="none"),
        trainer=trainer,
    )
    return schema.Plan(
        name="test",
        folder=Path("nowhere"),
        seed=0,
        model=schema.ModelSection(path="nowhere", max_tokens=16),
        engine=component(EngineSpec, "none"),
        engine_section=schema.EngineSection(name="none"),
        trainer=trainer,
        trainer_section=schema.TrainerSection(name="none"),
        sync=None,
        evaluation=schema.EvaluationSection(),
        checkpoint=schema.CheckpointSection(),
        publish=schema.PublishSection(),
        cluster=schema.ClusterSection(**cluster),
        stages=(stage,),
        callbacks=(),
        trackers=(),
        plugin_set=(),
        values={},
        origins={},
    )


@contextmanager
def replaced() -> Iterator[None]:
    """Within, the refs of `plan` lead to the classes of this module, and the tokenizer makes a letter of each token."""
    known: Mapping[str, Any] = {
        "test:counting": Counting,
        "test:single_turn": SingleTurn,
        "test:nonzero_std": NonzeroStd,
    }
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "".join(chr(97 + int(token) % 26) for token in tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miles_core.run.producer.resolve", known.__getitem__)
        patch.setattr("miles_core.run.collector.load_tokenizer", lambda model: tokenizer)
        yield


class Bench:
    """A collector in the hands of the test."""

    def __init__(self, made: schema.Plan, scores: Scores | None = None) -> None:
        self.plan = made
        self.engines = Engines()
        self.collector = Collector(made, Path("nowhere"), self.engines)
        self.scores = scores or Scores()
        self.collector._scorers[0] = self.scores  # type: ignore[assignment]

    async def begin(self, step: int = 0, folder: Path | None = None) -> None:
        self.engines.version = step
        await self.collector.begin(0, step, folder)

    async def settle(self) -> None:
        """Lets everything happen that can."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def batch(self, step: int, choose: Callable[[Sequence[int]], int]) -> Collected:
        """The batch of `step`; whenever nothing else can happen, the prompt that `choose` says is finished."""
        waiting = asyncio.create_task(self.collector.next_batch(step, 30.0))
        await self.settle()
        while not waiting.done():
            assert self.engines.waiting, "the collector waits, and nothing is under way"
            self.engines.finish(choose(sorted(self.engines.waiting)))
            await self.settle()
        collected = waiting.result()
        assert collected is not None
        return collected


def groups_of(collected: Collected) -> list[int]:
    """The prompts of a batch, each once, in order."""
    assert collected.batch is not None
    return list(dict.fromkeys(collected.batch.samples["group"].tolist()))
