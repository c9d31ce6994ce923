"""Options of this plugin; this module imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AcmeSuffixReward:
    """inside: the score of a response that has the answer, but not at its end. ignore_case: "Yes" and "yes" are the
    same.
    """

    inside: float = 0.5
    ignore_case: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.inside <= 1:
            raise ValueError(f"inside must be in [0, 1], got {self.inside}")
