"""The losses of PPO: the policy's clipped surrogate (`miles_grpo.loss.clipped`) and the critic's.

With V_t the critic's value, W_t its value before the batch's first update, and R_t the return:

    l_t = 1/2 max((V_t - R_t)^2, (clip(V_t, W_t - value_clip, W_t + value_clip) - R_t)^2)

Schulman et al., PPO, arXiv 1707.06347; the clipped value loss is that of OpenAI Baselines. The critic's part is no
matter of which policy wrote a token, so corrections leave it alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.loss.clipped import clipped
from miles_ppo.options import PPO, Critic

if TYPE_CHECKING:
    from torch import Tensor


def ppo(inputs: LossInputs, options: PPO) -> LossOutputs:
    """Per-token losses [T]: the policy's, and value_coef times the critic's as a penalty."""
    policy, values = clipped(inputs, options), critic(inputs, options)
    penalty = options.value_coef * values.losses
    return replace(
        policy,
        penalties=penalty if policy.penalties is None else policy.penalties + penalty,
        metrics={**policy.metrics, **values.metrics},
    )


def critic(inputs: LossInputs, options: Critic) -> LossOutputs:
    """Per-token losses [T]. Metrics: value_loss, value, and value_clip (1 where the bound stops the gradient)."""
    assert inputs.values is not None
    assert inputs.returns is not None
    losses = 0.5 * (inputs.values - inputs.returns).square()
    metrics: dict[str, Tensor] = {}
    if options.value_clip is not None:
        assert inputs.old_values is not None
        near = inputs.values.clamp(inputs.old_values - options.value_clip, inputs.old_values + options.value_clip)
        bounded = 0.5 * (near - inputs.returns).square()
        metrics["value_clip"] = (bounded > losses).to(losses.dtype)
        losses = losses.maximum(bounded)
    metrics |= {"value_loss": losses.detach(), "value": inputs.values.detach()}
    return LossOutputs(losses=losses, metrics=metrics)
