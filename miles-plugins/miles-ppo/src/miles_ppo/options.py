"""Options of the components; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles_grpo.options import WhitenOptions


@dataclass(frozen=True, kw_only=True)
class GAE(WhitenOptions):
    """gamma, lam: discount and decay per token.

    between_turns: tokens that the policy did not write, such as tool output, are left out ("skip": verl, AReaL), or are
    steps of their own with value 0 ("discount": OpenRLHF). whiten: the advantages over the batch (verl, OpenRLHF);
    returns never are. kl_coef, kl_estimator: the KL penalty that is taken off each token's reward; 0 switches it off.
    """

    gamma: float = 1.0
    lam: float = 0.95
    between_turns: Literal["skip", "discount"] = "skip"
    whiten: bool = True
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef must not be negative, got {self.kl_coef}")


@dataclass(frozen=True, kw_only=True)
class Critic:
    """value_clip: how far a value may move from the one before the batch's first update; None switches it off."""

    value_clip: float | None = 0.2

    def __post_init__(self) -> None:
        if self.value_clip is not None and not self.value_clip > 0:
            raise ValueError(f"value_clip must be positive, got {self.value_clip}")
