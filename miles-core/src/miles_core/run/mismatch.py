"""How far the policy that is trained is from the one that wrote the samples: measured at every step.

With d_t = log trainer(t) - log rollout(t) and the ratio w_t = exp(d_t), over the tokens that the rollout generated:

    logprob_abs, logprob_abs_max   mean and maximum of |d|
    k1                             mean of -d: unbiased estimate of KL(rollout || trainer), may be negative
    kl                             mean of w - 1 - d: the k3 estimate of the same, never negative
    effective_share                (sum of w)^2 / (N sum of w^2): the effective sample size by sample, 1 if they agree

A trainer's metrics are means over tokens; those whose name ends in `MAXIMUM` are maxima.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAXIMUM = "_max"
WEIGHT, SQUARE, SHARE = "/weight", "/weight_squared", "/effective_share"
_BOUND = 20.0
"""Of |d| before it is exponentiated."""


def mismatch(logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, Tensor]:
    """Metrics [T] of generated tokens, under names that begin with "mismatch/"; see `with_shares`."""
    difference = logprobs - rollout_logprobs
    bounded = difference.clamp(-_BOUND, _BOUND)
    ratio = bounded.exp()
    metrics = {
        "logprob_abs": difference.abs(),
        "logprob_abs_max": difference.abs(),
        "k1": -difference,
        "kl": ratio - 1 - bounded,
        "weight": ratio,
        "weight_squared": ratio.square(),
    }
    return {f"mismatch/{name}": values for name, values in metrics.items()}


def with_shares(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics with each mean of squared weights, of the mismatch or a correction, made an effective share."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        base = name.removesuffix(SQUARE)
        if base == name:
            found[name] = value
        else:
            found[base + SHARE] = metrics[base + WEIGHT] ** 2 / value if value else 0.0
    return found
