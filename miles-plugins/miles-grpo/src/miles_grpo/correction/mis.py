"""Masked importance sampling: tokens or whole sequences that the two policies disagree on are rejected.

With d_t = log pi(t) - log rollout(t), the statistic of a token is

    ratio   exp(d_t), kept within [low, high]
    k2      d_t^2 / 2, kept up to high
    k3      exp(d_t) - 1 - d_t, kept up to high: an unbiased estimate of KL(rollout || pi)

by itself, or summed, averaged or at its extremes over a sequence; of ratios the product and the geometric mean. A veto
rejects a sequence for a single token whose ratio is tiny. Liu et al., When Speed Kills Stability, 2025,
https://richardli.xyz/rl-collapse; verl's rollout_rs (which bounds rollout over trainer), AReaL's rejection sampling,
OpenRLHF's "seq-mask-tis", the veto of slime's mis example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_core.roles import CorrectionInputs, CorrectionOutputs, Segments
from miles_grpo.bounds import LOG_RATIO_BOUND, bounded_exp
from miles_grpo.correction.ratio import log_ratio
from miles_grpo.options import MIS

if TYPE_CHECKING:
    from torch import Tensor


def mis(inputs: CorrectionInputs, options: MIS) -> CorrectionOutputs:
    """Weights [T]. Metrics: masked, and vetoed where there is a veto (1 where a token is rejected)."""
    difference = log_ratio(inputs, options.policy)
    ratio = bounded_exp(difference)
    rejected = _rejected(difference, inputs.segments, options)
    metrics = {}
    if options.veto is not None:
        vetoed = _anywhere(ratio < options.veto, ratio, inputs.segments)
        metrics["vetoed"] = vetoed.to(ratio.dtype)
        rejected = rejected | vetoed
    metrics["masked"] = rejected.to(ratio.dtype)
    weights = ratio if options.weighted else ratio.new_ones(ratio.shape)
    return CorrectionOutputs(weights=weights.masked_fill(rejected, 0.0), metrics=metrics)


def _rejected(difference: Tensor, segments: Segments, options: MIS) -> Tensor:
    """Bool [T]: whose statistic is out of bounds. Ratios are summed and averaged as logarithms."""
    bounded = difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    statistic = bounded
    if options.statistic == "k2":
        statistic = 0.5 * bounded.square()
    elif options.statistic == "k3":
        statistic = bounded.exp() - 1 - bounded
    if options.level == "sequence-sum":
        statistic = segments.spread(segments.sum(statistic))
    elif options.level == "sequence-mean":
        statistic = segments.spread(segments.mean(statistic))
    if options.statistic == "ratio":
        ratio = bounded_exp(statistic)
        outside = (ratio < options.low) | (ratio > options.high)
    else:
        outside = statistic > options.high
    return _anywhere(outside, difference, segments) if options.level == "sequence-max" else outside


def _anywhere(condition: Tensor, like: Tensor, segments: Segments) -> Tensor:
    """Bool [T]: whether it holds for any token of the sequence, on any context-parallel rank."""
    return segments.spread(segments.sum(condition.to(like.dtype))) > 0
