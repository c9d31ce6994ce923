"""The clipped surrogate of PPO and GRPO, with separate bounds, dual clip and a KL penalty.

With ratio_t = pi(t) / pi_old(t) and advantage A_t:

    l_t = -min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)
    l_t = min(l_t, -dual_clip A_t)   where A_t < 0, if dual_clip is given
    l_t + kl_coef * KL_t             to the frozen reference

Schulman et al., PPO, arXiv 1707.06347, equation 7. A higher upper bound (clip-higher, 0.28): Yu et al., DAPO,
arXiv 2503.14476. Dual clip: Ye et al., arXiv 1912.09729. KL as a loss: DeepSeekMath, arXiv 2402.03300.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.kl import LOG_RATIO_BOUND, kl_estimate
from miles_grpo.options import ClippedLoss, KLOptions

if TYPE_CHECKING:
    from torch import Tensor


def clipped(inputs: LossInputs, options: ClippedLoss) -> LossOutputs:
    """Per-token losses [T].

    Metrics: ratio, ppo_kl (k1 of old and new policy), clip_low, clip_high and clip_dual (0 or 1: that bound stops the
    gradient), and kl to the reference.
    """
    assert inputs.advantages is not None
    assert inputs.old_logprobs is not None
    advantages = inputs.advantages
    difference = inputs.logprobs - inputs.old_logprobs
    ratio = difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    low, high = 1 - options.clip_low, 1 + options.clip_high
    losses = (-ratio * advantages).maximum(-ratio.clamp(low, high) * advantages)
    metrics = {
        "ratio": ratio.detach(),
        "ppo_kl": -difference.detach(),
        "clip_low": ((ratio < low) & (advantages < 0)).to(ratio.dtype),
        "clip_high": ((ratio > high) & (advantages > 0)).to(ratio.dtype),
    }
    if options.dual_clip is not None:
        bound = -options.dual_clip * advantages
        dual = (advantages < 0) & (losses > bound)
        losses = bound.where(dual, losses)
        metrics["clip_dual"] = dual.to(ratio.dtype)
    return with_kl(losses, metrics, inputs, options)


def with_kl(losses: Tensor, metrics: dict[str, Tensor], inputs: LossInputs, options: KLOptions) -> LossOutputs:
    """The losses plus the KL penalty, and the metric kl, if kl_coef is not 0."""
    if not options.kl_coef:
        return LossOutputs(losses=losses, metrics=metrics)
    assert inputs.ref_logprobs is not None
    kl = kl_estimate(inputs.logprobs, inputs.ref_logprobs, options.kl_estimator)
    return LossOutputs(losses=losses + options.kl_coef * kl, metrics={**metrics, "kl": kl.detach()})
