"""REINFORCE++: discounted returns, whitened over the whole batch instead of over a prompt's samples.

    reinforce++            A_t = whiten(G_t),   G_t = sum_{u >= t} gamma^(u - t) r_u
    reinforce++-baseline   the same, with the mean reward of the prompt's samples taken off the reward first

r_u is the reward of single tokens (`miles_grpo.advantage.token_rewards`); u counts trained tokens, so tool output
between two turns is skipped and not discounted. Hu, REINFORCE++, arXiv 2501.03262. verl whitens by the sample variance,
OpenRLHF by the population's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.groups import centred
from miles_grpo.advantage.scan import Floats, discounted
from miles_grpo.advantage.token_rewards import trained_rewards
from miles_grpo.advantage.whiten import whitened
from miles_grpo.options import ReinforcePlusPlus


def reinforce_plus_plus(inputs: AdvantageInputs, options: ReinforcePlusPlus) -> Mapping[str, Floats]:
    """Advantages [N]; columns old_logprobs and ref_logprobs if there is a KL penalty."""
    return {"advantages": _whitened_returns(inputs, inputs.rewards, options)}


def reinforce_plus_plus_baseline(inputs: AdvantageInputs, options: ReinforcePlusPlus) -> Mapping[str, Floats]:
    """Advantages [N]; columns old_logprobs and ref_logprobs if there is a KL penalty."""
    return {"advantages": _whitened_returns(inputs, centred(inputs.rewards, inputs.groups), options)}


def _whitened_returns(inputs: AdvantageInputs, rewards: Floats, options: ReinforcePlusPlus) -> Floats:
    per_token, last = trained_rewards(inputs, rewards, options.kl_coef, options.kl_estimator)
    returns = np.zeros(len(inputs.mask))
    returns[inputs.mask] = discounted(per_token, np.where(last, 0.0, options.gamma))
    return whitened(returns, inputs.mask, options)
