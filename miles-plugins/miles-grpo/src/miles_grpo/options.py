"""Options of the components; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GRPOAdvantage:
    """std: divisor n - 1 ("sample": TRL, verl, slime, OpenRLHF) or n ("population"). eps: added to the standard
    deviation: 1e-6 in verl and slime, 1e-4 in TRL, 1e-9 in OpenRLHF."""

    std: Literal["sample", "population"] = "sample"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, got {self.eps}")


@dataclass(frozen=True, kw_only=True)
class KLOptions:
    """What every policy loss has. kl_coef: weight of the KL divergence to the frozen reference, 0 switches it off.
    kl_estimator: see `miles_grpo.kl`."""

    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"

    def __post_init__(self) -> None:
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must not be negative, got {self.kl_coef}")


@dataclass(frozen=True, kw_only=True)
class ClippedLoss(KLOptions):
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]. dual_clip: bound on the loss of tokens with a negative
    advantage, as a multiple of it; above 1, commonly 3; None switches it off."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low must be in [0, 1], got {self.clip_low}")
        if self.clip_high < 0:
            raise ValueError(f"clip_high must not be negative, got {self.clip_high}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")
