"""Generalised advantage estimation.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t

V is 0 after a sample's last trained token, and r_t the reward of single tokens
(`miles_grpo.advantage.token_rewards`). Schulman et al., arXiv 1506.02438. The backward sum takes time linear in the
tokens of the batch, however they are spread over samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.scan import Floats, discounted, ends
from miles_grpo.advantage.token_rewards import trained_rewards
from miles_grpo.advantage.whiten import whitened
from miles_ppo.options import GAE


def gae(inputs: AdvantageInputs, options: GAE) -> Mapping[str, Floats]:
    """Advantages and returns [N]; column values, and old_logprobs and ref_logprobs if there is a KL penalty."""
    mask = inputs.mask
    steps = mask if options.between_turns == "skip" else _until_last(inputs)
    rewards, _ = trained_rewards(inputs, inputs.rewards, options.kl_coef, options.kl_estimator)
    values = np.where(mask, inputs.columns["values"], 0.0).astype(np.float64)
    on_tokens = np.zeros(len(mask))
    on_tokens[mask] = rewards
    advantages = np.zeros(len(mask))
    advantages[steps] = _backward(on_tokens[steps], values[steps], inputs.segment_ids[steps], options)
    advantages = np.where(mask, advantages, 0.0)
    returns = advantages + values
    return {
        "advantages": whitened(advantages, mask, options) if options.whiten else advantages,
        "returns": returns,
    }


def _backward(rewards: Floats, values: Floats, segments: NDArray[np.int64], options: GAE) -> Floats:
    """The recursion over the steps of all samples."""
    last = ends(segments)
    following = np.append(values[1:], 0.0)
    deltas = rewards + options.gamma * np.where(last, 0.0, following) - values
    return discounted(deltas, np.where(last, 0.0, options.gamma * options.lam))


def _until_last(inputs: AdvantageInputs) -> NDArray[np.bool_]:
    """Tokens up to their sample's last trained one, [N]. What comes before the first one changes nothing."""
    trained = np.flatnonzero(inputs.mask)
    last = np.full(len(inputs.rewards), -1)
    last[inputs.segment_ids[trained]] = trained
    until: NDArray[np.bool_] = np.arange(len(inputs.mask)) <= last[inputs.segment_ids]
    return until
