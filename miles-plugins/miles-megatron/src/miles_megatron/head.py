"""Log-probabilities and entropy from hidden states, the vocabulary spread over tensor-parallel ranks.

With z = hidden · weight / temperature and p = softmax(z), for each token y that is asked for:
log p(y) = z_y - logsumexp(z), whose gradient by z is onehot(y) - p; and the entropy H = logsumexp(z) - sum(p z), whose
gradient by z is -p (log p + H). Each rank holds some rows of the weight; maxima and sums go over the ranks, two or
three numbers a place and one a token. Everything after the matrix product is computed in float32, a chunk of places at
a time, so there never is a second copy of the logits; past `Limits.keep` there is not even a first one, and the
backward pass makes each chunk again. Left out: logit soft-capping.

Shapes: T places; M tokens that are asked for at each; V vocabulary, Vr this rank's part of it; H hidden.
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
    """See the head of the module. Returns log-probabilities [T, M] and entropies [T] (empty unless asked for)."""

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
    """Which targets lie in this rank's part, their places there (0 where they do not), and the scaled logits there;
    each [T, M]."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    places = targets.where(inside, 0)
    return inside, places, logits.gather(1, places).float() / temperature


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
    """Log-probability of each target, [T, M]; log of the sum of exponentials, entropy, each [T], the last maybe
    empty."""
    if logits.shape[1]:
        own_top, *sums = _fused(_sums, logits, temperature, entropy)
        inside, _, picked = _own(logits, targets, temperature)
    else:  # this rank has nothing but padding
        zeros, picked = torch.zeros(len(logits), device=logits.device), torch.zeros(targets.shape, device=logits.device)
        own_top, sums, inside = zeros - torch.inf, [zeros] * (2 if entropy else 1), picked > 0
    top = own_top.clone()
    _reduce(top, group, dist.ReduceOp.MAX)
    shift = (own_top - top).where(own_top != -torch.inf, 0.0)
    stacked = torch.cat([(picked - top[:, None]).where(inside, 0.0), torch.stack(_shifted(sums, shift), 1)], 1)
    _reduce(stacked, group, dist.ReduceOp.SUM)
    picked, (total, *products) = stacked[:, : targets.shape[1]], stacked[:, targets.shape[1] :].unbind(1)
    log_sum = total.log()
    spread = log_sum - products[0] / total if entropy else log_sum.new_empty(0)
    return picked - log_sum[:, None], top + log_sum, spread


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
    """-p (grad + grad_entropy (log p + H)) / temperature of every logit, in the type of the logits; grad: [T]."""
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
    1 - p of a likely token would be lost otherwise; a token that is asked for twice has the sum."""
    grad_logprobs, grad_entropy = grads
    total = grad_logprobs.sum(1)
    grad = _fused(_negative, logits, norm, total, grad_entropy, spread, temperature)
    if grad.shape[1]:
        inside, places, picked = _own(logits, targets, temperature)
        logprobs, factor = picked - norm[:, None], total[:, None]
        if grad_entropy is not None:
            factor = factor + (logprobs + spread[:, None]) * grad_entropy[:, None]
        own = ((_together(grad_logprobs, targets) - logprobs.exp() * factor) / temperature).to(grad.dtype)
        for number in range(targets.shape[1]):  # one at a time: those of other ranks all point at place 0
            at = places[:, number : number + 1]
            grad.scatter_(1, at, own[:, number : number + 1].where(inside[:, number : number + 1], grad.gather(1, at)))
    return grad


def _together(grads: Tensor, targets: Tensor) -> Tensor:
    """Each token's with those of the same token at the same place, [T, M]."""
    if targets.shape[1] == 1:
        return grads
    same = targets[:, :, None] == targets[:, None, :]
    return (same.to(grads.dtype) @ grads[:, :, None])[..., 0]


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
    nothing. targets: int64 [T] or [T, M] in the whole vocabulary. Returns log-probabilities, float32, in the shape of
    the targets, and entropies, float32 [T], or None unless asked for.
    """
    rank = 0 if group is None else group.rank()
    first = rank * len(weight)
    size = max(0, min(len(weight), vocabulary - first))
    own = weight if size == len(weight) else weight[:size]
    several = (targets[:, None] if targets.dim() == 1 else targets) - first
    logprobs, spread = _Logprobs.apply(hidden, own, several, temperature, entropy, group)  # type: ignore[no-untyped-call]
    return logprobs.view_as(targets), spread if entropy else None
