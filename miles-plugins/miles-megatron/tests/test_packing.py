"""Micro-batches: nothing lost, nothing over the budget, even over ranks; and each token where it should be."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_kit import make_batch

from miles_megatron.packing import Cut, Piece, pieces, plan, row

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def made(lengths: list[int]) -> list[Piece]:
    return [Piece(number, length, length) for number, length in enumerate(lengths)]


@settings(max_examples=200)
@given(LENGTHS, st.integers(1, 100), st.integers(1, 4), st.sampled_from([1, 2]))
def test_every_sample_is_in_one_micro_batch_within_the_budget(
    lengths: list[int], budget: int, ranks: int, group: int
) -> None:
    planned = plan(made(lengths), budget=budget, ranks=ranks, group=group)
    assert len({len(own) for own in planned}) == 1
    assert len(planned[0]) % group == 0
    real = [micro for own in planned for micro in own if not micro.dummy]
    assert sorted(piece.sample for micro in real for piece in micro.pieces) == list(range(len(lengths)))
    assert all(micro.tokens <= max(budget, max(lengths)) for micro in real)


@pytest.mark.parametrize("samples", [128, 512, 8192])
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize(("mean", "deviation", "budget"), [(6.5, 0.8, 16384), (6.5, 0.8, 8192), (7.0, 1.0, 16384)])
def test_samples_of_lognormal_length_fill_micro_batches_and_ranks_evenly(
    samples: int, ranks: int, mean: float, deviation: float, budget: int
) -> None:
    for seed in range(3):
        drawn = np.random.default_rng(seed).lognormal(mean, deviation, samples)
        lengths = np.clip(drawn, 16, budget).astype(int)
        total, longest = int(lengths.sum()), int(lengths.max())
        planned = plan(made(lengths.tolist()), budget=budget, ranks=ranks)
        loads = np.array([[0 if micro.dummy else micro.tokens for micro in own] for own in planned])
        assert loads.size == ranks * -(-total // (budget * ranks))  # the least that can hold them all
        # No plan is evener than the mean, or than the longest sample lets it be.
        assert loads.max() <= 1.01 * max(loads.mean(), longest)
        assert loads.sum(1).max() <= 1.01 * max(loads.sum(1).mean(), longest)
        # So the fill is the best that there is: less than one micro-batch of each rank stays empty.
        assert loads.mean() / budget > 1 - ranks / loads.size
        assert samples < 8192 or loads.mean() / budget >= 0.97


def test_a_plan_for_many_samples_takes_well_under_a_second() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6.5, 0.8, 8192), 16, 4096).astype(int).tolist()
    started = time.process_time()
    plan(made(lengths), budget=4096, ranks=4)
    assert time.process_time() - started < 1


@settings(max_examples=60)
@given(st.integers(0, 50), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]))
def test_every_trained_token_is_predicted_once_from_the_token_before_it(seed: int, context: int, multiple: int) -> None:
    batch = make_batch(seed, groups=2)
    cut = Cut(context=context, multiple=multiple)
    found = pieces(batch, range(len(batch)), cut)
    (own,) = plan(found, budget=2**20, ranks=1)
    rows = [row(batch, own[0], cut, rank) for rank in range(context)]
    assert len({len(each.tokens) for each in rows}) == 1
    assert all(len(each.tokens) % multiple == 0 for each in rows)
    assert sum(len(each.tokens) for each in rows) == rows[0].bounds[-1]
    np.testing.assert_array_equal(np.sort(np.concatenate([each.rows for each in rows])), np.flatnonzero(batch["mask"]))
    for each in rows:
        np.testing.assert_array_equal(each.tokens[each.sources], batch["tokens"][each.rows - 1])
        np.testing.assert_array_equal(each.targets, batch["tokens"][each.rows])
        samples = np.array([piece.sample for piece in own[0].pieces])[each.segments]
        np.testing.assert_array_equal(samples, batch.segment_ids[each.rows])
        assert each.left[each.sources].all()


def test_a_sample_whose_first_token_is_trained_is_refused() -> None:
    batch = make_batch()
    mask = batch["mask"].copy()
    mask[batch.cu_seqlens[1]] = True
    with pytest.raises(ValueError, match="sample 1: its first token is masked as trained"):
        pieces(batch.with_columns(mask=mask), range(len(batch)), Cut())
