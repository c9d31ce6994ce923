r"""Reward `number`: the final number of the response, compared exactly or within a tolerance.

Reads 1,234.5, -3/4, \frac{3}{4}, \dfrac34, 1.5e-3 and .5, each as the exact fraction it stands for. Units and signs of
currency or percent do not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from miles_core import Sample
from miles_rewards import options
from miles_rewards.answers import answer_of

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_CLOSED = r"[\w)\]}]"
"""What a minus sign stands after when it subtracts."""
_NUMBER = re.compile(
    rf"""(?P<sign>(?<!{_CLOSED})[-−]\$? | (?<!{_CLOSED})(?<!{_CLOSED}\s)[-−]\s+\$? | )
    (?:
        \\[dt]?frac\s*(?:{{\s*(?P<top>-?\d+)\s*}}|(?P<short_top>\d))\s*(?:{{\s*(?P<bottom>\d+)\s*}}|(?P<short_bottom>\d))
      | (?<![A-Za-z_\d])(?:(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL}) | (?P<plain>{_DECIMAL}))
    )""",
    re.VERBOSE,
)
_BOXED = re.compile(r"\\boxed\s*{")
_LONGEST = 400
"""Digits, and decimal exponent, past which something is no answer but an attempt on the memory."""


class Number:
    """1 if the response's number is the reference answer's, else 0."""

    def __init__(self, settings: options.Number) -> None:
        self.settings = settings

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One score a sample. Raises `ValueError` for a sample whose answer is missing or no number."""
        return [self._score(sample.text, answer_of(sample)) for sample in samples]

    def _score(self, text: str, answer: str) -> float:
        expected, given = last_number(answer), self._number(text)
        if expected is None:
            raise ValueError(f"the reference answer {answer!r} holds no number")
        if given is None:
            return 0.0
        return float(abs(given - expected) <= Fraction(self.settings.tolerance) * abs(expected))

    def _number(self, text: str) -> Fraction | None:
        boxed = last_boxed(text) if self.settings.where != "last" else None
        if boxed is not None:
            return last_number(boxed)
        return last_number(text) if self.settings.where != "boxed" else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete \boxed{…}, braces inside it balanced; None if there is none."""
    for opening in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for place in range(opening.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[opening.end() : place]
    return None


def last_number(text: str) -> Fraction | None:
    """The last number in a text; None if there is none, or if it is absurdly long."""
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def _value(match: re.Match[str]) -> Fraction | None:
    parts = match.groupdict()
    top = _fraction(parts["top"] or parts["short_top"] or parts["over"] or parts["plain"])
    bottom = _fraction(parts["bottom"] or parts["short_bottom"] or parts["under"] or "1")
    if top is None or not bottom:
        return None
    return -top / bottom if parts["sign"] else top / bottom


def _fraction(text: str) -> Fraction | None:
    digits, _, exponent = text.lower().partition("e")
    if len(digits) > _LONGEST or len(exponent) > 4 or abs(int(exponent or 0)) > _LONGEST:
        return None
    return Fraction(text.replace(",", ""))
