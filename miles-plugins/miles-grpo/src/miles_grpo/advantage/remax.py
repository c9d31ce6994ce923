"""ReMax: the baseline of a prompt is the reward of its greedy response.

    A_i = r_i - r(greedy response of the same prompt)

Li et al., ReMax, arXiv 2310.10505. The rollout `greedy-baseline` makes the greedy responses, which are not
trained. A prompt whose greedy response could not be scored has no baseline: its samples get 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.groups import Floats, spread, totals
from miles_grpo.advantage.token_rewards import sample_rewards
from miles_grpo.options import InReward


def remax(inputs: AdvantageInputs, options: InReward) -> Mapping[str, Floats]:
    """Advantages [N] from rewards, groups and which samples are baselines, whose reward has no KL in it."""
    assert inputs.baseline is not None
    rewards = sample_rewards(inputs, options)
    there = inputs.baseline.astype(np.float64)
    count = totals(there, inputs.groups)
    baseline = totals(there * rewards, inputs.groups) / np.maximum(count, 1)
    return {"advantages": spread(np.where(count > 0, rewards - baseline, 0.0), inputs)}
