"""Reward `math-verify`: mathematical equality, by the library math-verify.

Its time limits work by alarm signals, so it needs the main thread of its process; rewards have that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from miles_core import Sample
from miles_rewards import options
from miles_rewards.answers import answer_of


class MathVerify:
    """1 if the response's final expression equals the reference answer, else 0."""

    def __init__(self, settings: options.MathVerify) -> None:
        self.settings = settings
        self._gold = lru_cache(maxsize=64)(self._parsed_answer)  # a group has one answer

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One score a sample. Raises `ValueError` for a sample whose answer is missing or cannot be read."""
        return [self._score(sample.text, answer_of(sample)) for sample in samples]

    def _score(self, text: str, answer: str) -> float:
        gold, limit = self._gold(answer), self.settings.limit_s
        given = parse(text, parsing_timeout=limit)
        return float(verify(gold, given, float_rounding=self.settings.digits, timeout_seconds=limit))

    def _parsed_answer(self, answer: str) -> list[Any]:
        """An answer is an expression: it is read as such even without the dollar signs that one in prose needs."""
        delimited = "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer
        gold: list[Any] = parse(answer if delimited else f"${answer}$", parsing_timeout=self.settings.limit_s)
        if not gold:
            raise ValueError(f"math-verify cannot read the reference answer {answer!r}")
        return gold
