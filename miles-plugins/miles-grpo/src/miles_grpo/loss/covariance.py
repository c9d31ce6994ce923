"""Clip-Cov and KL-Cov: the few tokens that cost the most entropy are held back.

A token's covariance is cov_t = (log pi(t) - mean log pi) (A_t - mean A), means over the tokens at hand.

    clip-cov   the clipped surrogate, but `share` of all tokens, drawn from the unclipped ones with
               cov_low < cov_t < cov_high, lose their loss
    kl-cov     l_t = -ratio_t A_t, plus penalty |log ratio_t| for the `share` of tokens with the largest cov_t

Cui et al., The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, arXiv 2505.22617;
verl's "clip_cov" and "kl_cov".

"At hand" is a micro-batch, here as in verl: these two alone depend on how a batch is split. What clip-cov draws depends
on the number of candidates and on nothing else, so that a step can be repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.bounds import bounded_exp
from miles_grpo.loss.common import clip_metrics, finish, log_ratio, pessimistic
from miles_grpo.options import ClipCov, KLCov

if TYPE_CHECKING:
    from torch import Tensor


def clip_cov(inputs: LossInputs, options: ClipCov) -> LossOutputs:
    """Per-token losses [T]. Metrics: those of the clipped surrogate, and clip_cov (1 where the loss is dropped)."""
    assert inputs.advantages is not None
    ratio = bounded_exp(log_ratio(inputs))
    low, high = 1 - options.clip_low, 1 + options.clip_high
    losses = pessimistic(ratio, inputs.advantages, low, high)
    metrics = clip_metrics(ratio, inputs.advantages, low, high)
    covariance = _covariance(inputs)
    clipped = (metrics["clip_low"] + metrics["clip_high"]) > 0
    candidates = ((covariance > options.cov_low) & (covariance < options.cov_high) & ~clipped).nonzero()[:, 0]
    dropped = candidates[_drawn(len(candidates), _count(options.share, len(ratio)))]
    keep = ratio.detach().new_ones(ratio.shape).index_fill(0, dropped, 0.0)
    metrics["clip_cov"] = 1 - keep
    return finish(losses * keep, metrics, inputs, options)


def kl_cov(inputs: LossInputs, options: KLCov) -> LossOutputs:
    """Per-token losses [T]. Metrics: ratio, and kl_cov (1 where the penalty stands)."""
    assert inputs.advantages is not None
    difference = log_ratio(inputs)
    ratio = bounded_exp(difference)
    largest = _covariance(inputs).topk(_count(options.share, len(ratio))).indices
    chosen = ratio.detach().new_zeros(ratio.shape).index_fill(0, largest, 1.0)
    losses = -ratio * inputs.advantages + options.penalty * chosen * difference.abs()
    return finish(losses, {"ratio": ratio.detach(), "kl_cov": chosen}, inputs, options)


def _covariance(inputs: LossInputs) -> Tensor:
    """[T], without gradient."""
    assert inputs.advantages is not None
    logprobs = inputs.logprobs.detach()
    return (inputs.advantages - inputs.advantages.mean()) * (logprobs - logprobs.mean())


def _count(share: float, tokens: int) -> int:
    """How many tokens are held back: at least one, if there is any."""
    return min(max(int(share * tokens), 1), tokens)


def _drawn(candidates: int, count: int) -> list[int]:
    """`count` of the numbers below `candidates`, the same ones every time."""
    numbers: list[int] = np.random.default_rng(candidates).permutation(candidates)[:count].tolist()
    return numbers
