"""Sums that run backwards through packed samples, in time linear in their tokens. N tokens."""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def discounted(values: Floats, decays: Floats) -> Floats:
    """y_t = values_t + decays_t * y_{t+1}, [N]; a decay of 0 ends a sample.

    The tokens are cut into about sqrt(N) chunks, which are summed side by side; then what each takes over from the next
    one is added.
    """
    total = len(values)
    size = isqrt(total) + 1
    chunks = -(-total // size)
    shape = (chunks, size)
    sums = np.zeros(chunks * size)
    kept = np.zeros(chunks * size)
    sums[:total], kept[:total] = values, decays
    sums, kept = sums.reshape(shape), kept.reshape(shape)
    for place in range(size - 2, -1, -1):
        sums[:, place] += kept[:, place] * sums[:, place + 1]
        kept[:, place] *= kept[:, place + 1]
    for chunk in range(chunks - 2, -1, -1):
        sums[chunk] += kept[chunk] * sums[chunk + 1, 0]
    return sums.reshape(-1)[:total]


def ends(segment_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True at the last of each segment's entries, [N]."""
    last = np.ones(len(segment_ids), np.bool_)
    last[:-1] = segment_ids[1:] != segment_ids[:-1]
    return last
