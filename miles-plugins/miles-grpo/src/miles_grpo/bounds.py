"""Log-ratios are bounded before they are exponentiated, as in verl: exp(20) is 5e8, exp(89) overflows float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_BOUND = 20.0


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), between exp(-20) and exp(20); no gradient beyond."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
