"""DPPO: the trust region is a bound on a divergence, not on the ratio.

With p = pi(t), q = pi_old(t), and D the divergence between the two-way choices "token t or another":

    tv   D = |p - q|          kl   D = q log(q / p) + (1 - q) log((1 - q) / (1 - p))
    l_t = -sg[min(ratio_t, ratio_max)] A_t log p,   but 0 where the update would lead further away:
          A_t > 0, p > q, D > bound_high,   or   A_t <= 0, p < q, D > bound_low

Binary TV and binary KL of DPPO, arXiv 2602.04879; verl's "dppo_tv" and "dppo_kl".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.bounds import bounded_exp
from miles_grpo.loss.common import finish, log_ratio
from miles_grpo.options import DPPO

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-8
"""Keeps the logarithm of 1 - p finite."""


def dppo(inputs: LossInputs, options: DPPO) -> LossOutputs:
    """Per-token losses [T]. Metrics: ratio, divergence, clip_low and clip_high (1 where that bound drops the token)."""
    assert inputs.advantages is not None
    assert inputs.old_logprobs is not None
    ratio = bounded_exp(log_ratio(inputs)).detach()
    logprobs, old = inputs.logprobs.detach(), inputs.old_logprobs
    divergence = _binary_tv(logprobs, old) if options.divergence == "tv" else _binary_kl(logprobs, old)
    positive, up = inputs.advantages > 0, logprobs.exp() > old.exp()
    too_high = positive & up & (divergence > options.bound_high)
    too_low = ~positive & (logprobs.exp() < old.exp()) & (divergence > options.bound_low)
    keep = (~too_high & ~too_low).to(ratio.dtype)
    losses = -ratio.clamp(max=options.ratio_max) * inputs.advantages * inputs.logprobs * keep
    metrics = {
        "ratio": ratio,
        "divergence": divergence,
        "clip_low": too_low.to(ratio.dtype),
        "clip_high": too_high.to(ratio.dtype),
    }
    return finish(losses, metrics, inputs, options)


def _binary_tv(logprobs: Tensor, old: Tensor) -> Tensor:
    return (logprobs.exp() - old.exp()).abs()


def _binary_kl(logprobs: Tensor, old: Tensor) -> Tensor:
    p, q = logprobs.exp(), old.exp()
    return q * (old - logprobs) + (1 - q) * ((1 - q + _EPS) / (1 - p + _EPS)).log()
