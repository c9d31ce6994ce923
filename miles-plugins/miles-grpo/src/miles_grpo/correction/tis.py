"""Truncated importance sampling: the trainer's policy over the rollout's, bounded.

With d_t = log pi(t) - log rollout(t), the ratio of a token is

    token        exp(d_t)
    sequence     exp(sum of d over its sequence)
    geometric    exp(mean of d over its sequence)

and its weight min(ratio, high) to truncate, clip(ratio, low, high) to clip, or the ratio inside of [low, high] and 0
outside to mask. Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025,
https://fengyao.notion.site/off-policy-rl. `icepop` is the masked form for tokens: Ling team, Every Step Evolves,
arXiv 2510.18855. With the clipped loss and policy = "old" this is decoupled PPO: Hilton et al.,
arXiv 2110.00641; AReaL, arXiv 2505.24298.

A masked token keeps its place in the denominators of the aggregation; verl takes it out.
"""

from __future__ import annotations

from miles_core.roles import CorrectionInputs, CorrectionOutputs
from miles_grpo.bounds import bounded_exp
from miles_grpo.correction.ratio import log_ratio
from miles_grpo.options import TIS


def tis(inputs: CorrectionInputs, options: TIS) -> CorrectionOutputs:
    """Weights [T]. Metrics: ratio; above and below (1 where the ratio is beyond the bound); masked (1 where a token is
    masked) if that is what happens beyond."""
    difference, segments = log_ratio(inputs, options.policy), inputs.segments
    if options.level == "sequence":
        difference = segments.spread(segments.sum(difference))
    elif options.level == "geometric":
        difference = segments.spread(segments.mean(difference))
    ratio = bounded_exp(difference)
    above, below = ratio > options.high, ratio < options.low
    weights = ratio.clamp(options.low, options.high)
    metrics = {"ratio": ratio, "above": above.to(ratio.dtype), "below": below.to(ratio.dtype)}
    if options.how == "mask":
        weights = ratio.masked_fill(above | below, 0.0)
        metrics["masked"] = (above | below).to(ratio.dtype)
    return CorrectionOutputs(weights=weights, metrics=metrics)
