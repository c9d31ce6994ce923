"""The step of Megatron's optimizer, with one norm of the gradients.

Megatron's own step takes the norm again, and with a Transformer Engine that lacks one of its kernels it does so in a
loop that waits for the GPU at every parameter. Here all are taken together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import GRAD_NORM_GROUP_ATTR, SEPARATE_GRAD_NORM_GROUPS
from torch import Tensor


@torch.no_grad()
def gradient_norm(optimizer: Any) -> float:
    """The norm over all ranks' gradients, which it leaves ready for `step`; not finite if any gradient is not. A
    collective, with the same result on every rank."""
    optimizer.prepare_grads()
    return _norm(optimizer, None)


def _norm(optimizer: Any, group: str | None) -> float:
    """group: parameters that Megatron keeps out of the norm of all others: those of detached prediction layers.

    What is on several ranks counts once, but a copy that is not finite shows: what is not counted is taken 0 times.
    """
    total = 0.0
    for part in optimizer.chained_optimizers:
        squares = torch.zeros(1, device=torch.cuda.current_device())
        if gradients := _gradients(part.get_parameters()):
            counted = {id(gradient) for gradient in part.get_grads_for_grad_norm(group)}
            norms = torch._foreach_norm(gradients)
            squares += 0 * torch.stack(norms).sum()
            if own := [norm for norm, gradient in zip(norms, gradients, strict=True) if id(gradient) in counted]:
                squares += torch.stack(own).square().sum()
        dist.all_reduce(squares, group=part.get_grad_stats_parallel_group())
        total += squares.item()
    return math.sqrt(total)


@torch.no_grad()
def step(optimizer: Any, norm: float) -> None:
    """Clips the gradients, whose norm over all ranks is `norm`, and changes the weights."""
    _clip(optimizer, None, norm)
    for group in SEPARATE_GRAD_NORM_GROUPS:
        if [part for part in optimizer.chained_optimizers if part.has_grad_norm_group(group)]:
            _clip(optimizer, group, _norm(optimizer, group))
    if norm <= optimizer.config.grad_norm_skip_threshold:
        optimizer.step_with_ready_grads()


def _clip(optimizer: Any, group: str | None, norm: float) -> None:
    scale = optimizer.config.clip_grad / (norm + 1e-6)
    if not 0 < scale < 1:
        return
    parameters = [p for part in optimizer.chained_optimizers for p in part.get_parameters()]
    if found := _gradients(p for p in parameters if getattr(p, GRAD_NORM_GROUP_ATTR, None) == group):
        torch._foreach_mul_(found, scale)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those that there are, as `step` will take them."""
    pairs = ((parameter.grad, getattr(parameter, "decoupled_grad", None)) for parameter in parameters)
    found = (plain if decoupled is None else decoupled for plain, decoupled in pairs)
    return [gradient for gradient in found if gradient is not None]
