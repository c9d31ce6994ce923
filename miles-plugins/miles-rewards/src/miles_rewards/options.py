"""Options of this plugin's components."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Exact:
    """pattern: a regular expression; what its last match (its first group, if it has one) finds in the response is
    compared, and without a match the score is 0. None compares the whole response. ignore_spaces: spaces at the ends do
    not count, and any run of spaces is one. ignore_case: "Yes" and "yes" are the same.
    """

    pattern: str | None = None
    ignore_case: bool = False
    ignore_spaces: bool = True

    def __post_init__(self) -> None:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern is not a regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Number:
    r"""where: which number of the response counts: the one in its last \boxed{…}, the last one, or, without a box, the
    last one. tolerance: largest relative error.
    """

    where: Literal["boxed-or-last", "boxed", "last"] = "boxed-or-last"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance}")


@dataclass(frozen=True, kw_only=True)
class MathVerify:
    """digits: to which decimal numbers are compared. limit_s: whole seconds to read or compare one expression in, past
    which the response counts as wrong."""

    digits: int = 6
    limit_s: int = 2

    def __post_init__(self) -> None:
        if self.digits < 0:
            raise ValueError(f"digits must not be negative, got {self.digits}")
        if self.limit_s < 1:
            raise ValueError(f"limit_s must be at least 1, got {self.limit_s}")


@dataclass(frozen=True, kw_only=True)
class GymReward:
    """answer_tag: the verifier gets what stands in the last <tag>…</tag> of the response; None gives it the whole
    response without the spaces at its ends. partial: False makes every score below 1 a 0.
    """

    answer_tag: str | None = None
    partial: bool = True


@dataclass(frozen=True, kw_only=True)
class LengthPenalty:
    """max_tokens: from this length on the penalty is -1. cache: so many tokens before it sets in."""

    max_tokens: int
    cache: int

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.max_tokens:
            raise ValueError(f"cache must be between 1 and max_tokens ({self.max_tokens}), got {self.cache}")


@dataclass(frozen=True, kw_only=True)
class GymData:
    """task: a task of reasoning-gym, with `parameters`, the fields of its configuration. size: prompts before the same
    come again; None for no end. holdout: the fraction of questions, by content, that only evaluation asks.
    prompt: how a problem is put, with "{question}" or single values of the problem's metadata, such as "{expression}";
    chat, system: through the tokenizer's chat template. entry: whether the whole
    problem goes along for the reward `reasoning-gym`; without it only question and answer do.
    """

    task: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    holdout: float = 0.1
    prompt: str = "{question}"
    chat: bool = False
    system: str | None = None
    entry: bool = True

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if "{" not in self.prompt:
            raise ValueError(f'prompt must contain "{{question}}" or another field of the problem, got {self.prompt!r}')
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be between 0 and 1, got {self.holdout}")
