"""The loss of PPO's critic.

With V_t the critic's value, W_t its value before the batch's first update, and R_t the return:

    l_t = 1/2 max((V_t - R_t)^2, (clip(V_t, W_t - value_clip, W_t + value_clip) - R_t)^2)

Schulman et al., PPO, arXiv 1707.06347; the clipped value loss is that of OpenAI Baselines. The policy's half of PPO is
`miles_grpo.loss.clipped`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_core.roles import CriticInputs, LossOutputs
from miles_ppo.options import Critic

if TYPE_CHECKING:
    from torch import Tensor


def critic(inputs: CriticInputs, options: Critic) -> LossOutputs:
    """Per-token losses [T]. Metrics: value_loss, value, and value_clip (1 where the bound stops the gradient)."""
    losses = 0.5 * (inputs.values - inputs.returns).square()
    metrics: dict[str, Tensor] = {}
    if options.value_clip is not None:
        near = inputs.values.clamp(inputs.old_values - options.value_clip, inputs.old_values + options.value_clip)
        bounded = 0.5 * (near - inputs.returns).square()
        metrics["value_clip"] = (bounded > losses).to(losses.dtype)
        losses = losses.maximum(bounded)
    metrics |= {"value_loss": losses.detach(), "value": inputs.values.detach()}
    return LossOutputs(losses=losses, metrics=metrics)
