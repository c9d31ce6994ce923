"""OPO: the baseline that makes the gradient's variance least, if a response's squared gradient grows as its length.

    A_i = r_i - sum_j n_j r_j / sum_j n_j,   n_j the trained tokens of sample j, sums over the samples of one prompt

Hao et al., On-Policy RL with Optimal Reward Baseline, arXiv 2505.23585.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.groups import Floats, spread, totals
from miles_grpo.advantage.token_rewards import sample_rewards
from miles_grpo.options import InReward


def opo(inputs: AdvantageInputs, options: InReward) -> Mapping[str, Floats]:
    """Advantages [N] from rewards, groups and lengths."""
    rewards = sample_rewards(inputs, options)
    lengths = np.bincount(inputs.segment_ids[inputs.mask], minlength=len(inputs.rewards)).astype(np.float64)
    weights = np.maximum(totals(lengths, inputs.groups), 1)
    baseline = totals(lengths * rewards, inputs.groups) / weights
    return {"advantages": spread(rewards - baseline, inputs)}
