"""Log-probabilities and entropy from hidden states, the vocabulary spread over tensor-parallel ranks.

With z = hidden · weight / temperature and p = softmax(z), for the token y:
log p(y) = z_y - logsumexp(z), whose gradient by z is onehot(y) - p; and the entropy H = logsumexp(z) - sum(p z), whose
gradient by z is -p (log p + H). Each rank holds some rows of the weight; maxima and sums go over the ranks, three
numbers a token. Everything after the matrix product is computed in float32, a chunk of tokens at a time, so there
never is a second copy of the logits; past `KEEP_LIMIT` there is not even a first one, and the backward pass makes
each chunk again. Left out: logit soft-capping.

Shapes: T tokens; V vocabulary, Vr this rank's part of it; H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KEEP_LIMIT = 2**28
"""Most elements of logits that are kept for the backward pass (512 MiB in bfloat16)."""

CHUNK = 2**24
"""Elements of logits in one chunk, 64 MiB in float32."""


class _Logprobs(torch.autograd.Function):
    """See the head of the module. Returns log-probabilities [T] and entropies [T] (empty unless asked for)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, group: Any
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, CHUNK // max(1, len(weight)))
        keep = len(hidden) * len(weight) <= KEEP_LIMIT
        kept, parts = [], []
        for chunk, own in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            logits = chunk @ weight.t()
            kept.append(logits if keep else None)
            parts.append(_statistics(logits, own, temperature, entropy, group))
        logprobs, norm, spread = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, norm, spread)
        ctx.kept, ctx.rows, ctx.temperature, ctx.entropy = kept, rows, temperature, entropy
        return logprobs, spread

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, norm, spread = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for number, logits in enumerate(ctx.kept):
            own = slice(number * ctx.rows, (number + 1) * ctx.rows)
            if logits is None:
                logits = hidden[own] @ weight.t()
            ctx.kept[number] = None  # its memory is free for the next chunk
            grads = grad_logprobs[own], grad_entropy[own] if ctx.entropy else None
            grad = _gradient(logits, targets[own], norm[own], spread[own], grads, ctx.temperature)
            grad = grad.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[own])
            grad_weight.addmm_(grad.t(), hidden[own])
        return grad_hidden, grad_weight, None, None, None, None


def _own(targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in this rank's part, and their places there (0 where they do not)."""
    inside = (targets >= 0) & (targets < size)
    return inside, targets.where(inside, 0)


def _statistics(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, log of the sum of exponentials, entropy; each [T], the last maybe empty."""
    scaled = logits.float() / temperature
    size = scaled.shape[1]
    top = scaled.amax(-1) if size else scaled.new_full((len(scaled),), -torch.inf)
    _reduce(top, group, dist.ReduceOp.MAX)
    scaled -= top[:, None]
    inside, places = _own(targets, size)
    picked = scaled.gather(1, places[:, None])[:, 0].where(inside, 0.0) if size else torch.zeros_like(top)
    powers = scaled.exp()
    sums = [picked, powers.sum(-1)]
    if entropy:
        sums.append(powers.mul_(scaled).sum(-1))
    stacked = torch.stack(sums)
    _reduce(stacked, group, dist.ReduceOp.SUM)
    log_sum = stacked[1].log()
    spread = log_sum - stacked[2] / stacked[1] if entropy else log_sum.new_empty(0)
    return stacked[0] - log_sum, top + log_sum, spread


def _gradient(
    logits: Tensor,
    targets: Tensor,
    norm: Tensor,
    spread: Tensor,
    grads: tuple[Tensor, Tensor | None],
    temperature: float,
) -> Tensor:
    """Of the objective by this rank's logits, float32 [T, Vr]."""
    logprobs = (logits.float() / temperature).sub_(norm[:, None])
    grad_logprobs, grad_entropy = grads
    factor = (
        grad_logprobs[:, None]
        if grad_entropy is None
        else logprobs.add(spread[:, None]).mul_(grad_entropy[:, None]).add_(grad_logprobs[:, None])
    )
    grad = logprobs.exp_().mul_(factor).neg_()
    if grad.shape[1]:
        inside, places = _own(targets, grad.shape[1])
        grad.scatter_add_(1, places[:, None], grad_logprobs.where(inside, 0.0)[:, None])
    return grad.div_(temperature) if temperature != 1.0 else grad


def _reduce(tensor: Tensor, group: Any, op: Any) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary: int,
    temperature: float = 1.0,
    entropy: bool = False,
    group: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Of each target under softmax(hidden · weight / temperature), with gradient.

    hidden: [T, H], the same on all ranks of `group`; its gradient holds this rank's part alone, to be summed over them.
    weight: [Vr, H], this rank's rows; rows past the first `vocabulary` of all ranks together are padding and count for
    nothing. targets: int64 [T] in the whole vocabulary. Returns float32 [T] twice, None for entropies not asked for.
    """
    rank = 0 if group is None else group.rank()
    first = rank * len(weight)
    size = max(0, min(len(weight), vocabulary - first))
    own = weight if size == len(weight) else weight[:size]
    logprobs, spread = _Logprobs.apply(hidden, own, targets - first, temperature, entropy, group)  # type: ignore[no-untyped-call]
    return logprobs, spread if entropy else None
