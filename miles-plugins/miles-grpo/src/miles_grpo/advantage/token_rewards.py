"""KL in the reward: of single tokens, whose last one has the sample's own, or of the sample as a whole.

    r_t = reward [t is the last trained token] - kl_coef KL_t
    r   = reward - sum over the trained tokens t of kl_coef KL_t

with KL_t between the old policy and the reference, estimated from the sampled token as in `miles_grpo.kl`. Ziegler et
al., Fine-tuning language models from human preferences, arXiv 1909.08593; verl's use_kl_in_reward, TRL's beta for RLOO.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.scan import Floats, ends
from miles_grpo.options import InReward


def trained_rewards(
    inputs: AdvantageInputs, rewards: Floats, kl_coef: float, kl_estimator: Literal["k1", "k2", "k3"]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Of the trained tokens alone: their rewards, and which of them end a sample."""
    segments = inputs.segment_ids[inputs.mask]
    last = ends(segments)
    per_token = np.where(last, rewards[segments], 0.0)
    if kl_coef:
        per_token = per_token - kl_coef * _divergence(inputs, kl_estimator)
    return per_token, last


def sample_rewards(inputs: AdvantageInputs, options: InReward) -> Floats:
    """Of whole samples, [S]."""
    if not options.kl_coef:
        return inputs.rewards
    divergence = _divergence(inputs, options.kl_estimator)
    sums = np.bincount(inputs.segment_ids[inputs.mask], divergence, minlength=len(inputs.rewards))
    return inputs.rewards - options.kl_coef * sums


def _divergence(inputs: AdvantageInputs, estimator: Literal["k1", "k2", "k3"]) -> Floats:
    """Of the trained tokens alone: the estimate of KL(old policy || reference)."""
    difference = inputs.columns["old_logprobs"][inputs.mask] - inputs.columns["ref_logprobs"][inputs.mask]
    return _estimate(difference.astype(np.float64), estimator)


def _estimate(difference: Floats, estimator: Literal["k1", "k2", "k3"]) -> Floats:
    """As in `miles_grpo.kl`."""
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    bounded = np.clip(difference, -20.0, 20.0)
    return np.exp(-bounded) - 1 + bounded
