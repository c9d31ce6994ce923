"""GMPO: the geometric mean of the tokens' clipped ratios.

With d_t = log pi(t) - log pi_old(t), and c_t the one of d_t and clip(d_t, -clip_low, clip_high) that gives the smaller
objective for the sign of the advantage:

    l_i = -A_i exp(mean over the tokens of sequence i of c_t),   A_i the mean of the tokens' advantages

Every token of the sequence gets l_i, so the aggregation "sequence" gives the paper's objective. Zhao et al.,
Geometric-Mean Policy Optimization, arXiv 2507.20673; verl's "geo_mean".
"""

from __future__ import annotations

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.bounds import bounded_exp
from miles_grpo.loss.common import clip_metrics, finish, log_ratio
from miles_grpo.options import GeoMean


def geo_mean(inputs: LossInputs, options: GeoMean) -> LossOutputs:
    """Per-token losses [T], equal within a sequence. Metrics: ratio, clip_low, clip_high, of the tokens."""
    assert inputs.advantages is not None
    difference, sign, segments = log_ratio(inputs), inputs.advantages.sign(), inputs.segments
    bounded = difference.clamp(-options.clip_low, options.clip_high)
    chosen = sign * (sign * difference).minimum(sign * bounded)
    ratio = bounded_exp(segments.mean(chosen))
    losses = -segments.spread(segments.mean(inputs.advantages) * ratio)
    metrics = clip_metrics(
        bounded_exp(difference),
        inputs.advantages,
        float(bounded_exp(difference.new_tensor(-options.clip_low))),
        float(bounded_exp(difference.new_tensor(options.clip_high))),
    )
    return finish(losses, metrics, inputs, options)
