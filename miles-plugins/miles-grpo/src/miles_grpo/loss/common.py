"""What the policy losses share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.kl import kl_penalty
from miles_grpo.options import Regularised

if TYPE_CHECKING:
    from torch import Tensor


def log_ratio(inputs: LossInputs) -> Tensor:
    """log pi - log pi_old of each token, [T], with gradient."""
    assert inputs.old_logprobs is not None
    return inputs.logprobs - inputs.old_logprobs


def finish(losses: Tensor, metrics: dict[str, Tensor], inputs: LossInputs, options: Regularised) -> LossOutputs:
    """Adds the penalties, kl_coef * KL - entropy_coef * entropy, and the metrics kl and ppo_kl.

    ppo_kl is the k1 estimate of KL(old policy || policy): 0 before the first update.
    """
    if inputs.old_logprobs is not None:
        metrics = {**metrics, "ppo_kl": (inputs.old_logprobs - inputs.logprobs).detach()}
    penalties = None
    if options.kl_coef:
        kl = _kl(inputs, options)
        metrics = {**metrics, "kl": kl.detach()}
        penalties = options.kl_coef * kl
    if options.entropy_coef:
        assert inputs.entropy is not None
        bonus = -options.entropy_coef * inputs.entropy
        penalties = bonus if penalties is None else penalties + bonus
    return LossOutputs(losses=losses, penalties=penalties, metrics=metrics)


def clip_metrics(ratio: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """The ratio, and clip_low and clip_high: 1 where that bound stops the gradient, else 0."""
    return {
        "ratio": ratio.detach(),
        "clip_low": ((ratio < low) & (advantages < 0)).to(ratio.dtype),
        "clip_high": ((ratio > high) & (advantages > 0)).to(ratio.dtype),
    }


def pessimistic(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(ratio A, clip(ratio, low, high) A)."""
    return (-ratio * advantages).maximum(-ratio.clamp(low, high) * advantages)


def _kl(inputs: LossInputs, options: Regularised) -> Tensor:
    assert inputs.ref_logprobs is not None
    return kl_penalty(
        inputs.logprobs,
        inputs.ref_logprobs,
        inputs.old_logprobs,
        options.kl_estimator,
        options.kl_gradient,
        options.kl_clamp,
    )
