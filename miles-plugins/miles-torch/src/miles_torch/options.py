"""Options of the trainer `torch`: `[trainer]` and `[trainer.optimizer]` of a run file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW and its learning-rate schedule.

    learning_rate: the peak. betas, eps: AdamW's. max_grad_norm: gradients are scaled down to this norm; 0 switches
    clipping off. weight_decay: of matrices; vectors (norms, biases) are never decayed. schedule, min_ratio: from the
    peak down to `min_ratio * learning_rate` over the stage, after the warm-up. warmup_steps: optimizer steps of a
    linear rise.
    """

    learning_rate: float = 1e-6
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {self.betas}")
        if self.eps <= 0:
            raise ValueError(f"optimizer.eps must be positive, got {self.eps}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"optimizer.min_ratio must be between 0 and 1, got {self.min_ratio}")


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """The trainer `torch`.

    dtype: what it computes in; parameters and optimizer stay float32. micro_batch_tokens: most tokens of one forward
    and backward pass, prompts that samples share counted once; results do not depend on it, memory does (a longer
    sample runs alone). activation_checkpointing: keep only each layer's input and compute the rest again in the
    backward pass.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    micro_batch_tokens: int = 16384
    activation_checkpointing: bool = False
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)

    def __post_init__(self) -> None:
        if self.micro_batch_tokens < 1:
            raise ValueError(f"trainer.micro_batch_tokens must be at least 1, got {self.micro_batch_tokens}")
