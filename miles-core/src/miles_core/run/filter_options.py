"""Options of the filters that core offers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RewardRangeOptions:
    """Options of the filter `reward-range`. low, high: what the mean reward of a prompt's samples must lie strictly
    between."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
