from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_core.run.mismatch import mismatch, with_shares

logprobs = st.lists(st.tuples(st.floats(-5, -0.01), st.floats(-5, -0.01)), min_size=1, max_size=8)


def reported(trainer: list[float], rollout: list[float]) -> dict[str, float]:
    """As a trainer reports them: maxima of what ends in _max, else means."""
    metrics = mismatch(torch.tensor(trainer, dtype=torch.float64), torch.tensor(rollout, dtype=torch.float64))
    return with_shares({name: float(x.max() if name.endswith("_max") else x.mean()) for name, x in metrics.items()})


@given(rows=logprobs)
def test_every_measure_is_what_it_says(rows):
    trainer, rollout = (list(column) for column in zip(*rows, strict=True))
    differences = [a - b for a, b in rows]
    weights = [math.exp(d) for d in differences]
    count = len(rows)
    expected = {
        "mismatch/logprob_abs": sum(map(abs, differences)) / count,
        "mismatch/logprob_abs_max": max(map(abs, differences)),
        "mismatch/k1": -sum(differences) / count,
        "mismatch/kl": sum(w - 1 - d for w, d in zip(weights, differences, strict=True)) / count,
        "mismatch/weight": sum(weights) / count,
        "mismatch/effective_share": sum(weights) ** 2 / (count * sum(w * w for w in weights)),
    }
    assert reported(trainer, rollout) == pytest.approx(expected, abs=1e-12)


def test_equal_policies_differ_in_nothing():
    metrics = reported([-1.0, -2.0], [-1.0, -2.0])
    assert metrics.pop("mismatch/weight") == metrics.pop("mismatch/effective_share") == 1.0
    assert not any(metrics.values())


def test_policies_far_apart_stay_finite():
    assert all(math.isfinite(value) for value in reported([-1.0, -1e6], [-1e6, -1.0]).values())


def test_weights_that_are_all_zero_have_no_share():
    assert with_shares({"icepop/weight": 0.0, "icepop/weight_squared": 0.0, "loss": 1.0}) == {
        "icepop/weight": 0.0,
        "icepop/effective_share": 0.0,
        "loss": 1.0,
    }
