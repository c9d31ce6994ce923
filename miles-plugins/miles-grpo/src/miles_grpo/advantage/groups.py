"""Means and deviations over the samples of one prompt. S samples."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from miles_core.roles import AdvantageInputs

Floats = NDArray[np.float64]
Divisor = Literal["sample", "population"]


def totals(values: Floats, groups: NDArray[np.int64]) -> Floats:
    """The sum of `values` [S] over each sample's group, [S]."""
    group = np.unique(groups, return_inverse=True)[1]
    sums: Floats = np.bincount(group, values).astype(np.float64)
    return sums[group]


def sizes(groups: NDArray[np.int64]) -> Floats:
    """The number of samples in each sample's group, [S]."""
    return totals(np.ones(len(groups)), groups)


def centred(values: Floats, groups: NDArray[np.int64]) -> Floats:
    """`values` [S] minus their group's mean: 0 for a group of one."""
    return values - totals(values, groups) / sizes(groups)


def normalised(values: Floats, groups: NDArray[np.int64], divisor: Divisor, eps: float) -> Floats:
    """`values` [S] minus their group's mean, over its standard deviation plus `eps`."""
    difference = centred(values, groups)
    count = sizes(groups) - (divisor == "sample")
    deviation = np.sqrt(totals(difference**2, groups) / np.maximum(count, 1))
    return difference / (deviation + eps)


def spread(per_sample: Floats, inputs: AdvantageInputs) -> Floats:
    """[S] -> [N]: each sample's value at each of its trained tokens, 0 elsewhere."""
    return np.where(inputs.mask, per_sample[inputs.segment_ids], 0.0)
