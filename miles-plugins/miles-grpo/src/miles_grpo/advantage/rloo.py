"""RLOO: the baseline of a sample is the mean reward of its siblings without itself.

    A_i = r_i - sum_{j != i} r_j / (n - 1) = n / (n - 1) (r_i - mean(r))

Ahmadian et al., Back to Basics, arXiv 2402.14740. A group of one gets 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.groups import Floats, centred, sizes, spread
from miles_grpo.advantage.token_rewards import sample_rewards
from miles_grpo.options import InReward


def rloo(inputs: AdvantageInputs, options: InReward) -> Mapping[str, Floats]:
    """Advantages [N] from rewards and groups."""
    count = sizes(inputs.groups)
    factor = count / np.maximum(count - 1, 1)
    return {"advantages": spread(factor * centred(sample_rewards(inputs, options), inputs.groups), inputs)}
