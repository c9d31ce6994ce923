"""What turns a prompt into a scored group: the data source, the rollout and the rewards of a stage."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from miles_core.config.schema import Component, Plan, Stage
from miles_core.errors import RunError
from miles_core.plugins import resolve
from miles_core.roles import DataContext, DataSource, Rollout, Tokenizer
from miles_core.run.scoring import Scorer
from miles_core.sample import Completion, Group, IntArray, Prompt, Sampling
from miles_core.specs import Spec


class Engines(Protocol):
    """The engines, as a rollout's context reaches them."""

    aborted: int

    @property
    def busy_seconds(self) -> Sequence[float]: ...
    async def measure(self) -> Mapping[str, float]: ...
    async def generate(self, tokens: IntArray, seeds: Sequence[int], sampling: Sampling) -> list[Completion]: ...


class Clock:
    """Wall-clock seconds during which anything generated ("generate"), else during which anything was scored
    ("reward")."""

    def __init__(self) -> None:
        self._active: Counter[str] = Counter()
        self._since = time.monotonic()
        self._seconds: dict[str, float] = {"generate": 0.0, "reward": 0.0}
        self._changed = self._since

    @property
    def idle_seconds(self) -> float:
        """Since anything last began or ended, or a group was begun; 0 while something goes on."""
        return 0.0 if any(self._active.values()) else time.monotonic() - self._changed

    def enter(self, what: str) -> None:
        """One more does it."""
        self._account()
        self.stir()
        self._active[what] += 1

    def leave(self, what: str) -> None:
        """One fewer does it."""
        self._account()
        self.stir()
        self._active[what] -= 1

    def stir(self) -> None:
        """Nobody is idle now."""
        self._changed = time.monotonic()

    def read(self) -> dict[str, float]:
        """Seconds so far."""
        self._account()
        return dict(self._seconds)

    def _account(self) -> None:
        now = time.monotonic()
        for what in self._seconds:
            if self._active[what]:
                self._seconds[what] += now - self._since
                break
        self._since = now


@dataclass(kw_only=True)
class _Context:
    """`roles.RolloutContext`."""

    tokenizer: Tokenizer
    sampling: Sampling
    max_tokens: int
    engines: Engines | None
    clock: Clock

    async def generate(self, tokens: IntArray, seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        if self.engines is None:
            raise RunError("a rollout asked for tokens, but its record says that it needs no engine")
        self.clock.enter("generate")
        try:
            return await self.engines.generate(tokens, seeds, sampling)
        finally:
            self.clock.leave("generate")


class Producer:
    """Makes scored groups of one stage and split. Runs in the collector, many groups at once.

    scorer: None as long as there is nothing to score, and then every reward is 0.
    """

    def __init__(
        self,
        plan: Plan,
        stage: Stage,
        tokenizer: Tokenizer,
        engines: Engines | None,
        clock: Clock,
        *,
        split: Literal["train", "eval"] = "train",
        temperature: float | None = None,
    ) -> None:
        self.source: DataSource = built(
            stage.data,
            DataContext(
                tokenizer=tokenizer,
                max_prompt_tokens=plan.model.max_tokens - 1,
                seed=plan.seed,
                split=split,
            ),
        )
        self.rollout: Rollout = built(stage.rollout)
        self._rollout = stage.rollout.spec.name
        sampling = stage.sampling if temperature is None else replace(stage.sampling, temperature=temperature)
        self.context = _Context(
            tokenizer=tokenizer, sampling=sampling, max_tokens=plan.model.max_tokens, engines=engines, clock=clock
        )
        self.scorer: Scorer | None = None
        self._clock = clock
        self._seed = f"{plan.seed}/{stage.name}/{split}"

    def draw(self, position: int) -> Prompt:
        """The prompt at a position of the data source."""
        self.source.seek(position)
        return self.source.next()

    async def make(self, prompt: Prompt, count: int) -> Group:
        """`count` samples of a prompt, scored."""
        return await self.score(await self.generate(prompt, count))

    async def generate(self, prompt: Prompt, count: int) -> Group:
        """`count` samples of a prompt. The same run, stage, prompt and place give the same seed.

        Raises `RunError` if the rollout gives others, or not as many.
        """
        self._clock.stir()
        seeds = [self.seed(prompt.id, index) for index in range(count)]
        group = await self.rollout.run(prompt, seeds, self.context)
        given = [f"{sample.group}/{sample.index}" for sample in group]
        if given != [f"{prompt.id}/{index}" for index in range(count)]:
            raise RunError(
                f"rollout {self._rollout} gave the samples {', '.join(given) or '(none)'} of prompt {prompt.id}; it "
                f"must give {prompt.id}/0 to {prompt.id}/{count - 1}: one a seed, in order"
            )
        return group

    async def score(self, group: Group) -> Group:
        """The samples with their rewards."""
        if self.scorer is None:
            return [replace(sample, reward=0.0) for sample in group]
        self._clock.enter("reward")
        try:
            return await self.scorer.score(group)
        finally:
            self._clock.leave("reward")

    def seed(self, group: int, index: int) -> int:
        """Of one sample's random numbers, below 2**63."""
        digest = hashlib.blake2b(f"{self._seed}/{group}/{index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def built(component: Component[Spec], *args: Any) -> Any:
    """A component's object, `Class(options, *args)`."""
    return resolve(component.spec.ref)(component.options, *args)
