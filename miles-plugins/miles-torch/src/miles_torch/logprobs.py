"""Log-probabilities and entropy of chosen tokens, without a second copy of the logits.

With z = logits / temperature and p = softmax(z), for each token y that is asked for:
log p(y) = z_y - logsumexp(z), whose gradient by z is onehot(y) - p; and the entropy H = logsumexp(z) - sum(p z), whose
gradient by z is -p (log p + H). Everything is computed in float32, a few rows at a time, and made again in the backward
pass from the logits themselves: beside them and their gradient nothing has their size.

Shapes: T places, V vocabulary, M tokens that are asked for at each place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK, CUDA_CHUNK = 2**20, 2**24
"""Most numbers, of T x V, that are worked on at once: 4 MiB in float32, near a CPU's caches; 64 MiB, few kernels."""


class _TokenLogprobs(torch.autograd.Function):
    """See the head of the module. Returns logprobs [T, M] and entropy [T] (empty unless asked for)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        picked = logits.new_empty(targets.shape, dtype=torch.float32)
        spread = picked.new_empty(len(logits) if entropy else 0)
        for rows in _chunks(logits):
            logprobs = torch.log_softmax(_scaled(logits[rows], temperature), -1, dtype=torch.float32)
            torch.gather(logprobs, 1, targets[rows], out=picked[rows])
            if entropy:
                spread[rows] = logprobs.exp().mul_(logprobs).sum(-1).neg_()
        ctx.save_for_backward(logits, targets, spread)
        ctx.temperature, ctx.entropy = temperature, entropy
        return picked, spread

    @staticmethod
    def backward(ctx: Any, grad_picked: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, spread = ctx.saved_tensors
        gradient, total = torch.empty_like(logits), grad_picked.sum(1, keepdim=True)
        for rows in _chunks(logits):
            scaled = _scaled(logits[rows], ctx.temperature)
            if ctx.entropy:
                logprobs = torch.log_softmax(scaled, -1, dtype=torch.float32)
                part = logprobs.exp()
                factor = logprobs.add_(spread[rows, None]).mul_(grad_entropy[rows, None]).add_(total[rows])
                part.mul_(factor.neg_())
            else:
                part = torch.softmax(scaled, -1, dtype=torch.float32).mul_(-total[rows])
            part.scatter_add_(1, targets[rows], grad_picked[rows])
            torch.div(part, ctx.temperature, out=gradient[rows])
        return gradient, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    """Rows that are worked on at once, in turn."""
    rows = max(1, (CUDA_CHUNK if logits.is_cuda else CHUNK) // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


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
