"""The ratio of a trainer policy to the rollout policy, which every correction starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from miles_core.roles import CorrectionInputs

if TYPE_CHECKING:
    from torch import Tensor


def log_ratio(inputs: CorrectionInputs, policy: Literal["old", "current"]) -> Tensor:
    """log pi - log rollout of each token, [T]; pi before the batch's first update, or now."""
    of_policy = inputs.old_logprobs if policy == "old" else inputs.logprobs
    return of_policy - inputs.rollout_logprobs
