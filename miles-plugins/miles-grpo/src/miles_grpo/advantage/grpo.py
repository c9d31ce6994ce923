"""GRPO: a sample is as good as it beats its siblings, in units of their standard deviation.

    A_i = (r_i - mean(r)) / (std(r) + eps),   mean and std over the samples of one prompt

Shao et al., DeepSeekMath, arXiv 2402.03300, section 4.1. The paper leaves the divisor of the variance open; torch's
default, n - 1, is what TRL, verl, slime and OpenRLHF compute. A group of one has nothing to compare with: its advantage
is 0 (verl: its reward). Where all rewards are equal it is 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.groups import Floats, centred, sizes, spread, totals
from miles_grpo.options import GRPOAdvantage


def grpo(inputs: AdvantageInputs, options: GRPOAdvantage) -> Mapping[str, Floats]:
    """Advantages [N] from rewards and groups."""
    difference = centred(inputs.rewards, inputs.groups)
    divisor = sizes(inputs.groups) - (options.std == "sample")
    std = np.sqrt(totals(difference**2, inputs.groups) / np.maximum(divisor, 1))
    return {"advantages": spread(difference / (std + options.eps), inputs)}
