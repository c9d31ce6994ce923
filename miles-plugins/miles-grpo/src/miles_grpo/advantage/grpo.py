"""GRPO: a sample is as good as it beats its siblings, in units of their standard deviation.

    grpo       A_i = (r_i - mean(r)) / (std(r) + eps)
    dr-grpo    A_i = r_i - mean(r)

Mean and deviation are over the samples of one prompt. Shao et al., DeepSeekMath, arXiv 2402.03300, section 4.1. The
paper leaves the divisor of the variance open; torch's default, n - 1, is what TRL, verl, slime and OpenRLHF compute.
Dr. GRPO drops the deviation, which favours prompts that are very easy or very hard: Liu et al., arXiv 2503.20783. A
group of one has nothing to compare with: its advantage is 0 (verl: its reward).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.groups import Floats, centred, normalised, spread
from miles_grpo.advantage.token_rewards import sample_rewards
from miles_grpo.options import GRPOAdvantage, InReward


def grpo(inputs: AdvantageInputs, options: GRPOAdvantage) -> Mapping[str, Floats]:
    """Advantages [N] from rewards and groups."""
    rewards = sample_rewards(inputs, options)
    if options.scale == "group":
        return {"advantages": spread(normalised(rewards, inputs.groups, options.std, options.eps), inputs)}
    count = max(len(rewards) - (options.std == "sample"), 1)
    deviation = np.sqrt(np.sum((rewards - rewards.mean()) ** 2) / count) if count else 0.0
    return {"advantages": spread(centred(rewards, inputs.groups) / (deviation + options.eps), inputs)}


def dr_grpo(inputs: AdvantageInputs, options: InReward) -> Mapping[str, Floats]:
    """Advantages [N] from rewards and groups."""
    return {"advantages": spread(centred(sample_rewards(inputs, options), inputs.groups), inputs)}
