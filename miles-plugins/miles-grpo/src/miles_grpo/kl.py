"""Estimators of KL(policy || reference) from the policy's own samples.

With d = log pi(t) - log ref(t) at a token t drawn from pi:

    k1 = d                   unbiased, may be negative, large variance
    k2 = d^2 / 2             biased; its gradient is that of the true KL
    k3 = exp(-d) - 1 + d     unbiased, never negative

John Schulman, Approximating KL divergence, http://joschu.net/blog/kl-approx.html. Differentiated as a loss, k1 pushes
nothing on average (its expected gradient is 0), k2 gives the gradient of KL(pi || ref), k3 that of KL(ref || pi).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to plus and minus this, as in verl: exp(20) is 5e8, exp(89) overflows float32."""


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """[T], with the gradient of `logprobs`."""
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    bounded = difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (-bounded).exp() - 1 + bounded
