"""Rewards of single tokens: the sample's reward at its last trained token, minus a KL penalty at each.

r_t = reward [t is the last trained token] - kl_coef * KL_t,   KL_t between the old policy and the reference
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.scan import Floats, ends


def trained_rewards(
    inputs: AdvantageInputs, rewards: Floats, kl_coef: float, kl_estimator: Literal["k1", "k2", "k3"]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Of the trained tokens alone: their rewards, and which of them end a sample."""
    segments = inputs.segment_ids[inputs.mask]
    last = ends(segments)
    per_token = np.where(last, rewards[segments], 0.0)
    if kl_coef:
        difference = inputs.columns["old_logprobs"][inputs.mask] - inputs.columns["ref_logprobs"][inputs.mask]
        per_token = per_token - kl_coef * _estimate(difference.astype(np.float64), kl_estimator)
    return per_token, last


def _estimate(difference: Floats, estimator: Literal["k1", "k2", "k3"]) -> Floats:
    """As in `miles_grpo.kl`."""
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    bounded = np.clip(difference, -20.0, 20.0)
    return np.exp(-bounded) - 1 + bounded
