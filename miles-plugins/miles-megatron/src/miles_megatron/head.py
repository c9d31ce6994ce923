"""Log-probabilities and entropy from hidden states, the vocabulary spread over tensor-parallel ranks.

With z = hidden · weight / temperature and p = softmax(z), for the token y:
log p(y) = z_y - logsumexp(z), whose gradient by z is onehot(y) - p; and the entropy H = logsumexp(z) - sum(p z), whose
gradient by z is -p (log p + H). Each rank holds some rows of the weight; maxima and sums go over the ranks, three
numbers a token. Everything after the matrix product is computed in float32, a chunk of tokens at a time, so there
never is a second copy of the logits; past `Limits.keep` there is not even a first one, and the backward pass makes
each chunk again. Left out: logit soft-capping.

Shapes: T tokens; V vocabulary, Vr this rank's part of it; H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """keep: most elements of logits that are kept for the backward pass. chunk: elements of logits at a time."""

    keep: int
    chunk: int


LIMITS = {"cpu": Limits(keep=2**28, chunk=2**24), "cuda": Limits(keep=2**32, chunk=2**30)}
"""By type of device. On a GPU what follows the matrix product is compiled and makes no float32 logits at all."""


class _Logprobs(torch.autograd.Function):
    """See the head of the module. Returns log-probabilities [T] and entropies [T] (empty unless asked for)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, group: Any
    ) -> tuple[Tensor, Tensor]:
        limits = LIMITS[hidden.device.type]
        rows = max(1, limits.chunk // max(1, len(weight)))
        keep = len(hidden) * len(weight) <= limits.keep
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
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for number, logits in enumerate(ctx.kept):
            own = slice(number * ctx.rows, (number + 1) * ctx.rows)
            if logits is None:
                logits = hidden[own] @ weight.t()
            ctx.kept[number] = None  # its memory is free for the next chunk
            grads = grad_logprobs[own], grad_entropy[own] if ctx.entropy else None
            grad = _gradient(logits, targets[own], norm[own], spread[own], grads, ctx.temperature)
            torch.mm(grad, weight, out=grad_hidden[own])
            _add_product(grad_weight, grad, hidden[own])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """Adds a chunk's part of the gradient by the weight; in float32 over chunks, whatever each is computed in."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.t(), hidden)
    else:
        total += grad.t() @ hidden


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def _fused(function: Callable[..., Tensor], logits: Tensor, *rest: Any) -> Tensor:
    """Calls it; on a GPU as one kernel, which reads the logits once or twice where PyTorch would ten times."""
    if not logits.is_cuda:
        return function(logits, *rest)
    for tensor in (logits, *rest):
        if isinstance(tensor, Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(function)(logits, *rest)


def _own(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets lie in this rank's part, their places there (0 where they do not), and the scaled logits there."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    places = targets.where(inside, 0)
    return inside, places, logits.gather(1, places[:, None])[:, 0].float() / temperature


def _sums(logits: Tensor, temperature: float, entropy: bool) -> Tensor:
    """Of this rank's part: the maximum m, sum(exp(z - m)), and if asked for sum(exp(z - m) (z - m)); [2 or 3, T]."""
    scaled = logits.float() / temperature
    top = scaled.amax(-1)
    scaled = scaled - top[:, None]
    powers = scaled.exp()
    sums = [top, powers.sum(-1)]
    if entropy:
        sums.append((powers * scaled).sum(-1))
    return torch.stack(sums)


def _statistics(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, log of the sum of exponentials, entropy; each [T], the last maybe empty."""
    if logits.shape[1]:
        own_top, *sums = _fused(_sums, logits, temperature, entropy)
        inside, _, picked = _own(logits, targets, temperature)
    else:  # this rank has nothing but padding
        zeros = torch.zeros(len(logits), device=logits.device)
        own_top, sums, inside, picked = zeros - torch.inf, [zeros] * (2 if entropy else 1), zeros > 0, zeros
    top = own_top.clone()
    _reduce(top, group, dist.ReduceOp.MAX)
    shift = (own_top - top).where(own_top != -torch.inf, 0.0)
    stacked = torch.stack([(picked - top).where(inside, 0.0), *_shifted(sums, shift)])
    _reduce(stacked, group, dist.ReduceOp.SUM)
    log_sum = stacked[1].log()
    spread = log_sum - stacked[2] / stacked[1] if entropy else log_sum.new_empty(0)
    return stacked[0] - log_sum, top + log_sum, spread


def _shifted(sums: Sequence[Tensor], shift: Tensor) -> list[Tensor]:
    """The sums of `_sums` with m - shift in place of m."""
    scale = shift.exp()
    found = [sums[0] * scale]
    if len(sums) > 1:
        found.append((sums[1] + shift * sums[0]) * scale)
    return found


def _negative(
    logits: Tensor, norm: Tensor, grad: Tensor, grad_entropy: Tensor | None, spread: Tensor, temperature: float
) -> Tensor:
    """-p (grad + grad_entropy (log p + H)) / temperature of every logit, in the type of the logits."""
    logprobs = logits.float() / temperature - norm[:, None]
    factor = grad[:, None]
    if grad_entropy is not None:
        factor = factor + (logprobs + spread[:, None]) * grad_entropy[:, None]
    return (logprobs.exp() * factor * (-1.0 / temperature)).to(logits.dtype)


def _gradient(
    logits: Tensor,
    targets: Tensor,
    norm: Tensor,
    spread: Tensor,
    grads: tuple[Tensor, Tensor | None],
    temperature: float,
) -> Tensor:
    """Of the objective by this rank's logits, [T, Vr] in their type. Each target's is computed apart in float32, since
    1 - p of a likely token would be lost otherwise."""
    grad_logprobs, grad_entropy = grads
    grad = _fused(_negative, logits, norm, grad_logprobs, grad_entropy, spread, temperature)
    if grad.shape[1]:
        inside, places, picked = _own(logits, targets, temperature)
        logprobs = picked - norm
        factor = grad_logprobs if grad_entropy is None else grad_logprobs + (logprobs + spread) * grad_entropy
        own = ((grad_logprobs - logprobs.exp() * factor) / temperature).to(grad.dtype)
        grad.scatter_(1, places[:, None], own[:, None].where(inside[:, None], grad.gather(1, places[:, None])))
    return grad


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
