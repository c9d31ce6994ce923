"""The clipped surrogate of PPO and GRPO, with separate bounds and dual clip.

With ratio_t = pi(t) / pi_old(t) and advantage A_t:

    l_t = -min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)
    l_t = min(l_t, -dual_clip A_t)   where A_t < 0, if dual_clip is given

Schulman et al., PPO, arXiv 1707.06347, equation 7; Shao et al., DeepSeekMath (GRPO), arXiv 2402.03300. A higher upper
bound (clip-higher, 0.28): Yu et al., DAPO, arXiv 2503.14476. Dual clip: Ye et al., arXiv 1912.09729; it is also TRL's
two-sided clipping `delta` and AReaL's `c_clip`.
"""

from __future__ import annotations

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.bounds import bounded_exp
from miles_grpo.loss.common import clip_metrics, finish, log_ratio, pessimistic
from miles_grpo.options import ClippedLoss


def clipped(inputs: LossInputs, options: ClippedLoss) -> LossOutputs:
    """Per-token losses [T]. Metrics: ratio, clip_low, clip_high and clip_dual (0 or 1: that bound stops the gradient),
    and those of `miles_grpo.loss.common.finish`."""
    assert inputs.advantages is not None
    advantages = inputs.advantages
    ratio = bounded_exp(log_ratio(inputs))
    low, high = 1 - options.clip_low, 1 + options.clip_high
    losses = pessimistic(ratio, advantages, low, high)
    metrics = clip_metrics(ratio, advantages, low, high)
    if options.dual_clip is not None:
        bound = -options.dual_clip * advantages
        dual = (advantages < 0) & (losses > bound)
        losses = bound.where(dual, losses)
        metrics["clip_dual"] = dual.to(ratio.dtype)
    return finish(losses, metrics, inputs, options)
