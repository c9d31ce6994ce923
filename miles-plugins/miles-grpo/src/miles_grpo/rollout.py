"""The rollout of ReMax: sampled responses, and a greedy one to compare them with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from miles_core.roles import RolloutContext
from miles_core.run.rollouts import SingleTurn
from miles_core.sample import Completion, Group, IntArray, Prompt, Sampling


class GreedyBaseline:
    """As core's single-turn rollout, but the last sample of each prompt is greedy, not trained, and the baseline."""

    def __init__(self, options: None = None) -> None:
        self._single_turn = SingleTurn()

    async def run(self, prompt: Prompt, seeds: Sequence[int], context: RolloutContext) -> Group:
        """One sample per seed; a single one is the baseline alone."""
        sampled, (greedy,) = await asyncio.gather(
            self._single_turn.run(prompt, seeds[:-1], context),
            self._single_turn.run(prompt, seeds[-1:], _Greedy(context)),
        )
        untrained = np.zeros(len(greedy.response), np.bool_)
        return [*sampled, replace(greedy, index=len(sampled), mask=untrained, baseline=True)]


class _Greedy:
    """The same context, but nothing is drawn at random."""

    def __init__(self, context: RolloutContext) -> None:
        self.tokenizer, self.max_tokens = context.tokenizer, context.max_tokens
        self.sampling = replace(context.sampling, temperature=0.0)
        self._generate = context.generate

    async def generate(self, tokens: IntArray, seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        return await self._generate(tokens, seeds, sampling)
