"""GDPO: each reward is normalised within its group by itself, so that no large one drowns the others.

    A_i = whiten(sum_k w_k (r_ik - mean_k) / (std_k + eps_std)),   w_k the weight of reward k in the run file

Liu et al., GDPO, arXiv 2601.05242. verl whitens over tokens, TRL ("normalize_then_sum") over samples. A reward that a
sample does not have counts 0 for it and is left out of the group's mean.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.groups import Floats, normalised, spread
from miles_grpo.advantage.whiten import whitened
from miles_grpo.options import GDPO


def gdpo(inputs: AdvantageInputs, options: GDPO) -> Mapping[str, Floats]:
    """Advantages [N] from each reward's scores and groups."""
    total = np.zeros(len(inputs.rewards))
    for name, scores in inputs.reward_parts.items():
        total += inputs.reward_weights.get(name, 1.0) * _part(scores, inputs.groups, options)
    if options.whiten == "samples":
        total = whitened(total, np.ones(len(total), np.bool_), options)
    advantages = spread(total, inputs)
    if options.whiten == "tokens":
        advantages = whitened(advantages, inputs.mask, options)
    return {"advantages": advantages}


def _part(scores: Floats, groups: NDArray[np.int64], options: GDPO) -> Floats:
    """One reward's normalised scores [S], 0 for a sample that does not have it."""
    there = np.isfinite(scores)
    part = np.zeros(len(scores))
    part[there] = normalised(scores[there], groups[there], options.std, options.eps_std)
    return part
