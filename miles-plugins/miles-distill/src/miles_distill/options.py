"""Options of the components; imports nothing heavy.

Where published implementations differ, an option chooses and says who does what; docs/reference/algorithms.md has it
all in one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ReverseKL:
    """gamma: discount of what later tokens of the sample say; 0 leaves each token to itself. clamp: bound on the
    difference of log-probabilities; None is none (verl's loss_max_clamp: 10). recompute: the policy's log-probabilities
    come from the trainer, by a forward pass (slime, verl), and not from the engine that drew the tokens (Thinking
    Machines). reward_coef: weight of the reward, normalised within the prompt's samples as in GRPO, that is added.
    """

    gamma: float = 0.0
    clamp: float | None = None
    recompute: bool = False
    reward_coef: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp must be positive, got {self.clamp}")
        if not self.reward_coef >= 0:
            raise ValueError(f"reward_coef must not be negative, got {self.reward_coef}")


@dataclass(frozen=True, kw_only=True)
class Distill:
    """top_k: how many of the teacher's likeliest tokens are compared. divergence: "reverse" is KL(policy || teacher),
    "forward" KL(teacher || policy), "jsd" the generalised Jensen-Shannon divergence with weight `beta` of the teacher.
    tail: what becomes of all other tokens. "bucket" makes one of them (TRL's loss_add_tail); "renormalise" leaves them
    out and makes what remains sum to 1 (TRL without it); "drop" leaves them out, and is for "forward" alone (verl).
    """

    top_k: int = 64
    divergence: Literal["reverse", "forward", "jsd"] = "reverse"
    beta: float = 0.5
    tail: Literal["bucket", "renormalise", "drop"] = "bucket"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.beta < 1:
            raise ValueError(f'beta must be between 0 and 1, got {self.beta}; its ends are "forward" and "reverse"')
        if self.tail == "drop" and self.divergence != "forward":
            raise ValueError(f'tail = "drop" goes with divergence = "forward" alone, not with "{self.divergence}"')
        if self.tail == "renormalise" and self.top_k == 1:
            raise ValueError('tail = "renormalise" leaves nothing to compare of top_k = 1')
