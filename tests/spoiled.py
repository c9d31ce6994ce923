"""Rollouts that break their contract, each in one way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from miles_core.run.rollouts import SingleTurn
from miles_core.sample import Group, Prompt, Sample


class _Spoiled:
    """Core's single-turn rollout, with something done to its groups."""

    def __init__(self, options: None) -> None:
        self._inner = SingleTurn()

    async def run(self, prompt: Prompt, seeds: Sequence[int], context: Any) -> Group:
        return self.spoil(await self._inner.run(prompt, seeds, context))

    def spoil(self, group: Group) -> Group:
        return group


class Empty(_Spoiled):
    def spoil(self, group: Group) -> Group:
        return []


class Fewer(_Spoiled):
    def spoil(self, group: Group) -> Group:
        return group[1:]


class Ragged(_Spoiled):
    def spoil(self, group: Group) -> Group:
        return [replace(sample, logprobs=sample.logprobs[:-1]) for sample in group]


class Impossible(_Spoiled):
    """The engine says that it could not have written the last token of the second sample."""

    def spoil(self, group: Group) -> Group:
        logprobs = group[1].logprobs.copy()
        logprobs[-1] = -np.inf
        return [group[0], replace(group[1], logprobs=logprobs), *group[2:]]


class Masked(_Spoiled):
    def spoil(self, group: Group) -> Group:
        return [_masked(sample) for sample in group]


class HalfMasked(_Spoiled):
    """Every first sample of a prompt has no trained token."""

    def spoil(self, group: Group) -> Group:
        return [_masked(group[0]), *group[1:]]


def _masked(sample: Sample) -> Sample:
    return replace(sample, mask=np.zeros(len(sample.mask), np.bool_))
