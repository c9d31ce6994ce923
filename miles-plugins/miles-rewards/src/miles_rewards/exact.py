"""Reward `exact`: string equality after normalisation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from miles_core import Sample
from miles_rewards import options
from miles_rewards.answers import answer_of


class Exact:
    """1 if the response is the reference answer, else 0."""

    def __init__(self, settings: options.Exact) -> None:
        self.settings = settings

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One score a sample. Raises `ValueError` for a sample without answer."""
        return [self._score(sample.text, answer_of(sample)) for sample in samples]

    def _score(self, text: str, answer: str) -> float:
        found = self._found(text)
        return float(found is not None and self._normal(found) == self._normal(answer))

    def _found(self, text: str) -> str | None:
        if self.settings.pattern is None:
            return text
        matches = list(re.finditer(self.settings.pattern, text))
        return matches[-1].group(1 if matches[-1].re.groups else 0) if matches else None

    def _normal(self, text: str) -> str:
        if self.settings.ignore_spaces:
            text = " ".join(text.split())
        return text.casefold() if self.settings.ignore_case else text
