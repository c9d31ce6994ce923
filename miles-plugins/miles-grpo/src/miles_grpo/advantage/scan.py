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
    size = isqrt(len(values)) + 1
    sums, kept = _chunks(values, size), _chunks(decays, size)
    for place in range(size - 2, -1, -1):
        sums[place] += kept[place] * sums[place + 1]
        kept[place] *= kept[place + 1]
    carried = np.zeros(sums.shape[1])
    for chunk in range(len(carried) - 2, -1, -1):
        carried[chunk] = sums[0, chunk + 1] + kept[0, chunk + 1] * carried[chunk + 1]
    sums += kept * carried
    return sums.T.reshape(-1)[: len(values)]


def _chunks(column: Floats, size: int) -> Floats:
    """[N] -> [size, chunks], the tokens of a chunk below one another, 0 after the last token."""
    chunks = -(-len(column) // size)
    return np.pad(column, (0, chunks * size - len(column))).reshape(chunks, size).T.copy()


def ends(segment_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True at the last of each segment's entries, [N]."""
    last = np.ones(len(segment_ids), np.bool_)
    last[:-1] = segment_ids[1:] != segment_ids[:-1]
    return last
