"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from miles_torch.options import OptimizerOptions


def build(model: nn.Module, options: OptimizerOptions) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters. Matrices are decayed, vectors (norms, biases) are not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
        fused=True,
    )


def learning_rate(options: OptimizerOptions, step: int, steps: int) -> float:
    """Of optimizer step `step` (from 0) of a stage's `steps`.

    It rises linearly over the warm-up; the step after it has the peak, and from there it falls by the schedule, to the
    lowest rate after the stage's last step.
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / (options.warmup_steps + 1)
    done = min(1.0, (step - options.warmup_steps) / max(1, steps - options.warmup_steps))
    if options.schedule == "constant":
        factor = 1.0
    elif options.schedule == "linear":
        factor = 1.0 - done
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * done))
    return options.learning_rate * (options.min_ratio + (1.0 - options.min_ratio) * factor)
