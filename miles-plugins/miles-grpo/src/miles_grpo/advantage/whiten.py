"""Whitening: mean 0 and variance 1 over all trained tokens of the batch, so over all data-parallel ranks.

(A_t - mean) / sqrt(variance + eps)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from miles_grpo.advantage.groups import Divisor, Floats


def whitened(values: Floats, mask: NDArray[np.bool_], divisor: Divisor, eps: float) -> Floats:
    """[N], 0 where masked. One trained token, or none, has nothing to be compared with and gets 0."""
    trained = values[mask]
    result = np.zeros(len(values))
    if len(trained) > 1:
        variance = trained.var(ddof=1 if divisor == "sample" else 0)
        result[mask] = (trained - trained.mean()) / np.sqrt(variance + eps)
    return result
