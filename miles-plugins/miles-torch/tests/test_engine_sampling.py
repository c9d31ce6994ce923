"""Drawing tokens: distributions, cuts and random streams against independent references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from miles_core.sample import Sampling
from miles_torch.sampling import SamplingTable, sample, uniforms

CPU = torch.device("cpu")


def draw(logits: torch.Tensor, rows: list[Sampling], draws: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return sample(logits, SamplingTable.of(rows, logits.shape[-1], CPU), torch.from_numpy(draws))


def counts(logits: torch.Tensor, sampling: Sampling, trials: int) -> np.ndarray:
    """How often each token comes in `trials` draws, each by the first number of a seed of its own."""
    draws = np.array([uniforms(seed, 1)[0] for seed in range(trials)])
    tokens, _ = draw(logits.expand(trials, -1), [sampling] * trials, draws)
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1])


def chi_square_is_ordinary(seen: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the statistic lies below its 99.9 % quantile (by Wilson and Hilferty)."""
    used = expected > 0
    statistic = ((seen[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    return bool(statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(5)) * 1.5
    expected = torch.softmax(logits[0].double() / temperature, -1).numpy() * 20_000
    seen = counts(logits, Sampling(temperature=temperature), 20_000)
    assert chi_square_is_ordinary(seen, expected)
    assert not chi_square_is_ordinary(np.roll(seen, 1), expected)  # the test can fail


def test_what_a_cut_leaves_keeps_its_proportions() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(6)) * 1.5
    kept = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(12)(None, logits.double()))
    expected = torch.softmax(kept[0], -1).numpy() * 20_000
    seen = counts(logits, Sampling(top_k=12, top_p=0.7), 20_000)
    assert (seen[expected == 0] == 0).all()
    assert chi_square_is_ordinary(seen, expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.sampled_from([0, 1, 2, 5, 29, 30, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.2, 0.01]),
)
def test_cuts_leave_the_tokens_that_transformers_leaves(seed: int, top_k: int, top_p: float) -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(seed)) * 2
    kept = logits.double()
    if top_k:
        kept = TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)
    draws = np.linspace(0, 1, 4000, endpoint=False)
    tokens, _ = draw(logits.expand(4000, -1), [Sampling(top_k=top_k, top_p=top_p)] * 4000, draws)
    likely = torch.softmax(kept[0], -1) > 1e-3  # what the grid of draws cannot miss
    found = set(tokens.tolist())
    assert found <= set(torch.isfinite(kept[0]).nonzero().flatten().tolist())
    assert found >= set(likely.nonzero().flatten().tolist())


def test_rows_do_not_disturb_each_other() -> None:
    rows = [
        Sampling(), Sampling(temperature=0), Sampling(top_k=3), Sampling(temperature=0.3, top_p=0.5),
        Sampling(temperature=2.0),
    ]  # fmt: skip
    logits = torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(7))
    draws = uniforms(3, len(rows))
    tokens, logprobs = draw(logits, rows, draws)
    for row, sampling in enumerate(rows):
        token, logprob = draw(logits[row : row + 1], [sampling], draws[row : row + 1])
        assert tokens[row] == token[0]
        assert logprobs[row] == logprob[0]
    assert tokens[1] == logits[1].argmax()
    assert logprobs[1] == torch.log_softmax(logits[1], -1).max()


@given(seed=st.integers(-(2**70), 2**70), count=st.integers(1, 50), more=st.integers(1, 50))
def test_a_stream_is_a_function_of_its_seed_and_goes_on_where_it_was(seed: int, count: int, more: int) -> None:
    stream = uniforms(seed, count + more)
    assert ((stream >= 0) & (stream < 1)).all()
    np.testing.assert_array_equal(uniforms(seed, count), stream[:count])
    assert not np.array_equal(uniforms(seed + 1, count + more), stream)


def test_streams_are_uniform_along_a_seed_and_across_seeds() -> None:
    along = uniforms(11, 20_000)
    across = np.array([uniforms(seed, 3)[2] for seed in range(20_000)])
    for numbers in (along, across):
        seen, _ = np.histogram(numbers, bins=50, range=(0, 1))
        assert chi_square_is_ordinary(seen, np.full(50, len(numbers) / 50))


def test_an_impossible_token_never_comes_even_at_the_ends() -> None:
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 2], logits[0, 4] = 0.0, -1e-3
    for value in (0.0, 1 - 2**-52):
        token, _ = draw(logits, [Sampling()], np.array([value]))
        assert token.item() in (2, 4)
