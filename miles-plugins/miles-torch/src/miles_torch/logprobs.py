"""Log-probabilities and entropy of chosen tokens, keeping one copy of the logits.

With z = logits / temperature and p = softmax(z), for each token y that is asked for:
log p(y) = z_y - logsumexp(z), whose gradient by z is onehot(y) - p; and the entropy H = logsumexp(z) - sum(p z), whose
gradient by z is -p (log p + H). Everything is computed in float32. The backward pass makes p again from the saved
log-probabilities, so no second [T, V] tensor lives between the passes.

Shapes: T places, V vocabulary, M tokens that are asked for at each place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _TokenLogprobs(torch.autograd.Function):
    """See the head of the module. Returns logprobs [T, M] and entropy [T] (empty unless asked for)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        scaled = logits if temperature == 1.0 else logits / temperature
        logprobs = torch.log_softmax(scaled, dim=-1, dtype=torch.float32)
        picked = logprobs.gather(1, targets)
        spread = -(logprobs.exp() * logprobs).sum(-1) if entropy else logprobs.new_empty(0)
        ctx.save_for_backward(logprobs, targets, spread)
        ctx.temperature, ctx.entropy, ctx.dtype = temperature, entropy, logits.dtype
        return picked, spread

    @staticmethod
    def backward(ctx: Any, grad_picked: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None, None]:
        logprobs, targets, spread = ctx.saved_tensors
        grad, total = logprobs.exp(), grad_picked.sum(1, keepdim=True)
        if ctx.entropy:
            factor = logprobs.add(spread[:, None]).mul_(grad_entropy[:, None]).add_(total)
            grad.mul_(factor.neg_())
        else:
            grad.mul_(-total)
        grad.scatter_add_(1, targets, grad_picked)
        if ctx.temperature != 1.0:
            grad.div_(ctx.temperature)
        return grad.to(ctx.dtype), None, None, None


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Of each target under softmax(logits / temperature), with gradient.

    logits: [T, V] of any floating type; targets: int64 [T] or [T, M]. Returns log-probabilities, float32, in the shape
    of the targets, and the entropy of each row, float32 [T], or None unless asked for.
    """
    several = targets[:, None] if targets.dim() == 1 else targets
    picked, spread = _TokenLogprobs.apply(logits, several, temperature, entropy)  # type: ignore[no-untyped-call]
    # A tensor of its own, because FSDP2 puts hooks on what a module returns, and those of a view can be lost.
    return picked.view_as(targets).clone(), spread if entropy else None
