"""Whitening: mean 0 and variance 1 over all trained tokens of the batch, so over all data-parallel ranks.

(A_t - mean) / sqrt(variance + eps)   or   (A_t - mean) / (sqrt(variance) + eps)

Huang et al., The N+ Implementation Details of RLHF with PPO, arXiv 2403.17031; `WhitenOptions` says who does
which.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from miles_grpo.advantage.groups import Floats
from miles_grpo.options import WhitenOptions


def whitened(values: Floats, mask: NDArray[np.bool_], options: WhitenOptions) -> Floats:
    """[N], 0 where masked. One trained token, or none, has nothing to be compared with and gets 0."""
    trained = values[mask]
    result = np.zeros(len(values))
    if len(trained) > 1:
        variance = trained.var(ddof=1 if options.variance == "sample" else 0)
        in_variance = options.eps_added_to == "variance"
        scale = np.sqrt(variance + options.eps) if in_variance else np.sqrt(variance) + options.eps
        result[mask] = (trained - trained.mean()) / scale
    return result
