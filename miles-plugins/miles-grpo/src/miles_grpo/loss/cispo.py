"""CISPO: the importance weight is clipped and held constant, so that every token keeps its gradient.

    l_t = -sg[clip(ratio_t, 1 - clip_low, 1 + clip_high)] A_t log pi(t)

MiniMax-M1, arXiv 2506.13585, section 3.1. The paper and TRL set only the upper bound; verl both.
"""

from __future__ import annotations

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.bounds import bounded_exp
from miles_grpo.loss.common import finish, log_ratio
from miles_grpo.options import CISPO


def cispo(inputs: LossInputs, options: CISPO) -> LossOutputs:
    """Per-token losses [T]. Metrics: ratio, clip_low and clip_high (1 where that bound holds the weight)."""
    assert inputs.advantages is not None
    ratio = bounded_exp(log_ratio(inputs)).detach()
    low, high = 1 - options.clip_low, 1 + options.clip_high
    losses = -ratio.clamp(low, high) * inputs.advantages * inputs.logprobs
    metrics = {"ratio": ratio, "clip_low": (ratio < low).to(ratio.dtype), "clip_high": (ratio > high).to(ratio.dtype)}
    return finish(losses, metrics, inputs, options)
