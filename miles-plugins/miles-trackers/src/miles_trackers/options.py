"""Options of this plugin's trackers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Curves:
    """every: steps between two drawings (about a second of the driver's time each); 0 draws only at the end.
    smoothing: steps over which a smoothed curve looks back, on average.
    """

    every: int = 50
    smoothing: float = 8.0

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every must not be negative, got {self.every}")
        if self.smoothing < 1:
            raise ValueError(f"smoothing must be at least 1, got {self.smoothing}")
