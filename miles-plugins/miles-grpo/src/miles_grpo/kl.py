"""Estimators of KL(policy || reference) from sampled tokens.

With d = log pi(t) - log ref(t) at a token t drawn from pi:

    k1 = d                   unbiased, may be negative, large variance
    k2 = d^2 / 2             biased
    k3 = exp(-d) - 1 + d     unbiased, never negative; d is bounded to +-20
    abs = |d|

John Schulman, Approximating KL divergence, http://joschu.net/blog/kl-approx.html. `clamp` bounds the estimate to
+-clamp: 10 in OpenRLHF and AReaL, 10 for k3 alone in verl, none in TRL.

An unbiased value is not an unbiased gradient. `gradient` says what is differentiated, with w = pi(t) / pi_old(t):

    direct         the estimate itself. k1 then pushes nothing on average, k2 gives the gradient of KL(pi || ref), k3
                   that of KL(ref || pi)
    k2             value of the estimate, gradient of k2: right on-policy; verl's "k1+" and "k3+"
    k2-weighted    the same times min(w, 10), held constant: right off-policy too; OpenRLHF's unbiased_gradient
    weighted       w times the estimate, both differentiated; DeepSeek-V3.2, TRL's use_bias_correction_kl
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from miles_grpo.bounds import LOG_RATIO_BOUND, bounded_exp

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "abs"]
Gradient = Literal["direct", "k2", "k2-weighted", "weighted"]
WEIGHT_BOUND = 10.0
"""OpenRLHF's bound on w in "k2-weighted"."""


def estimate(difference: Tensor, estimator: Estimator, clamp: float | None = None) -> Tensor:
    """The estimate of each token's d = log policy - log reference, [T] -> [T]."""
    if estimator == "k1":
        value = difference
    elif estimator == "k2":
        value = 0.5 * difference.square()
    elif estimator == "abs":
        value = difference.abs()
    else:
        bounded = difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        value = (-bounded).exp() - 1 + bounded
    return value if clamp is None else value.clamp(-clamp, clamp)


def kl_penalty(
    logprobs: Tensor,
    reference: Tensor,
    old_logprobs: Tensor | None,
    estimator: Estimator,
    gradient: Gradient,
    clamp: float | None,
) -> Tensor:
    """[T], with the gradient that is asked for. The weighted gradients need old_logprobs."""
    difference = logprobs - reference
    value = estimate(difference, estimator, clamp)
    if gradient == "direct":
        return value
    if gradient == "k2":
        return _straight_through(value, 0.5 * difference.square())
    assert old_logprobs is not None
    weight = bounded_exp(logprobs - old_logprobs)
    if gradient == "weighted":
        return weight * value
    return _straight_through(value, weight.detach().clamp(max=WEIGHT_BOUND) * 0.5 * difference.square())


def _straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of the one and the gradient of the other."""
    return value.detach() + surrogate - surrogate.detach()
