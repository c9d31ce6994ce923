from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.config.schema import LossSection
from miles_core.errors import RunError
from miles_core.run.weights import aggregate, split
from miles_core.sample import Batch, Sample

AGGREGATIONS = ["token", "sequence", "sequence-sum", "group", "constant"]


def make(group: int, index: int, mask: list[bool]) -> Sample:
    length = len(mask)
    return Sample(
        group=group,
        index=index,
        prompt=np.array([1, 2], np.int32),
        response=np.arange(length, dtype=np.int32),
        mask=np.array(mask, bool),
        logprobs=np.zeros(length, np.float32),
        versions=np.zeros(length, np.int32),
        status="completed",
        text="",
        reward=0.0,
    )


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    masks = st.lists(st.booleans(), min_size=0, max_size=6)
    samples = [make(7 * group, index, draw(masks)) for group, size in enumerate(sizes) for index in range(size)]
    return draw(st.permutations(samples))


def section(aggregation: str) -> LossSection:
    return LossSection(
        name="x",
        aggregation=aggregation,  # type: ignore[arg-type]
        aggregation_length=9 if aggregation == "constant" else None,
    )


def value(sample: Sample, token: int) -> float:
    """A loss for each token that depends on nothing but the sample and the token."""
    return float(np.sin(1.0 + 13 * sample.group + 5 * sample.index + token))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def objective_by_loops(samples: list[Sample], aggregation: str) -> float:
    """The objective of one mini-batch as a person would write it down."""
    losses = {
        (sample.group, sample.index): [value(sample, t) for t in range(len(sample.mask)) if sample.mask[t]]
        for sample in samples
    }
    live = {key: values for key, values in losses.items() if values}
    every = [x for values in live.values() for x in values]
    groups: dict[int, list[float]] = {}
    for (group, _), values in live.items():
        groups.setdefault(group, []).extend(values)
    return {
        "token": mean(every),
        "sequence": mean([mean(values) for values in live.values()]),
        "sequence-sum": mean([sum(values) for values in live.values()]),
        "group": mean([mean(values) for values in groups.values()]),
        "constant": sum(every) / (max(len(live), 1) * 9),
    }[aggregation]


def objective(batch: Batch, samples: list[Sample], minibatch: int) -> float:
    losses = np.concatenate(
        [[0.0] * len(s.prompt) + [value(s, t) if s.mask[t] else np.pi for t in range(len(s.mask))] for s in samples]
    )
    chosen = batch.samples["minibatch"][batch.segment_ids] == minibatch
    return float(np.sum(batch["weights"][chosen] * losses[chosen]))


@given(samples=sample_lists(), aggregation=st.sampled_from(AGGREGATIONS), data=st.data())
def test_objective_of_each_minibatch_equals_the_loops(samples, aggregation, data):
    count = data.draw(st.integers(1, len(samples)))
    batch = aggregate(Batch.pack(samples), section(aggregation), count)
    minibatch = batch.samples["minibatch"]
    for m in range(count):
        members = [sample for sample, its in zip(samples, minibatch, strict=True) if its == m]
        assert objective(batch, samples, m) == pytest.approx(objective_by_loops(members, aggregation), abs=1e-12)


@given(samples=sample_lists(), aggregation=st.sampled_from(AGGREGATIONS), data=st.data())
def test_order_of_the_samples_does_not_matter(samples, aggregation, data):
    count = data.draw(st.integers(1, len(samples)))
    order = data.draw(st.permutations(range(len(samples))))
    batch = aggregate(Batch.pack(samples), section(aggregation), count)
    shuffled = aggregate(Batch.pack([samples[i] for i in order]), section(aggregation), count)
    expected = batch.select(order)
    np.testing.assert_array_equal(shuffled.samples["minibatch"], expected.samples["minibatch"])
    np.testing.assert_array_equal(shuffled["weights"], expected["weights"])


@given(samples=sample_lists(), aggregation=st.sampled_from(AGGREGATIONS))
def test_masked_tokens_weigh_nothing_and_packing_in_micro_batches_changes_nothing(samples, aggregation):
    batch = aggregate(Batch.pack(samples), section(aggregation), 1)
    assert not batch["weights"][~batch["mask"]].any()
    assert np.isfinite(batch["weights"]).all()
    pieces = [batch.select([row]) for row in range(len(batch))]
    total = sum(objective(piece, [samples[row]], 0) for row, piece in enumerate(pieces))
    assert total == pytest.approx(objective(batch, samples, 0), abs=1e-12)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), data=st.data())
def test_groups_stay_whole_and_no_minibatch_is_empty(sizes, data):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    indices = np.concatenate([np.arange(size) for size in sizes])
    count = data.draw(st.integers(1, len(groups)))
    minibatch = split(groups, indices, count)
    assert set(minibatch) == set(range(count))
    assert (np.diff(minibatch) >= 0).all()
    if count <= len(sizes):
        assert all(len(set(minibatch[groups == group])) == 1 for group in range(len(sizes)))


@pytest.mark.parametrize(("groups", "size", "count"), [(8, 4, 4), (8, 4, 3), (2, 6, 4), (5, 1, 5)])
def test_minibatches_are_about_equal(groups, size, count):
    minibatch = split(np.repeat(np.arange(groups), size), np.tile(np.arange(size), groups), count)
    counts = np.bincount(minibatch)
    unit = size if groups >= count else 1
    assert counts.max() - counts.min() <= unit


def test_a_minibatch_of_nothing_but_masked_tokens_weighs_nothing():
    batch = Batch.pack([make(0, 0, [False, False]), make(1, 0, [])])
    for aggregation in AGGREGATIONS:
        assert not aggregate(batch, section(aggregation), 2)["weights"].any()


def test_truncated_samples_can_be_masked_and_then_count_for_nothing():
    samples = [make(0, 0, [True, True]), replace(make(0, 1, [True] * 3), status="truncated"), make(1, 0, [True])]
    loss = replace(section("sequence"), mask_truncated=True)
    batch = aggregate(Batch.pack(samples), loss, 1)
    np.testing.assert_array_equal(batch["weights"][batch["mask"]], [0.25, 0.25, 0.5])
    assert batch["mask"].sum() == 3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_weight_of_a_sample_multiplies_its_tokens_weights(aggregation):
    samples = [make(0, 0, [True, True]), make(0, 1, [True]), make(1, 0, [True] * 3)]
    plain = aggregate(Batch.pack(samples), section(aggregation), 1)
    samples[1] = replace(samples[1], weight=2.5)
    weighted = aggregate(Batch.pack(samples), section(aggregation), 1)
    factors = np.where(weighted.segment_ids == 1, 2.5, 1.0)
    np.testing.assert_allclose(weighted["weights"], plain["weights"] * factors)


@pytest.mark.parametrize("status", ["failed", "aborted"])
def test_samples_that_could_not_be_scored_are_not_trained(status):
    samples = [make(0, 0, [True, True]), replace(make(0, 1, [True] * 3), status=status)]
    batch = aggregate(Batch.pack(samples), section("sequence"), 1)
    np.testing.assert_array_equal(batch["weights"], [0, 0, 0.5, 0.5, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_log_probability_that_is_not_finite_names_its_token(value):
    broken = make(4, 2, [False, True])
    broken.logprobs[1] = value
    with pytest.raises(RunError, match=r"rollout_logprobs is (nan|-inf) at token 3 of sample 4/2"):
        aggregate(Batch.pack([make(0, 0, [True]), broken]), section("token"), 1)


def test_fewer_samples_than_minibatches_are_refused():
    with pytest.raises(ValueError, match="1 samples cannot be split into 2"):
        aggregate(Batch.pack([make(0, 0, [True])]), section("token"), 2)
