"""Options of this plugin's callbacks; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NanGuard:
    """patience: optimizer steps in a row that may be skipped; one more stops the run."""

    patience: int = 3

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")


@dataclass(frozen=True, kw_only=True)
class AuxLossProbe:
    """coefficient: weight of the z-loss; 0 only measures it."""

    coefficient: float = 1e-4

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise ValueError(f"coefficient must not be negative, got {self.coefficient}")
