"""What a teacher's engines are asked of a batch, and the columns that come of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core import LossSpec, ScoreRequest, Scores
from miles_core.errors import RunError
from miles_core.run.teaching import columns, score_requests, shares
from miles_core.sample import Batch
from miles_core.testing.fakes import make_batch


def told(request: ScoreRequest, seed: int) -> Scores:
    """Anything of the right shape."""
    rng, shape = np.random.default_rng(seed), (len(request.tokens) - request.first, request.top_k)
    return Scores(
        logprobs=-rng.random(shape[0]).astype(np.float32),
        top_tokens=rng.integers(0, 50, shape).astype(np.int32),
        top_logprobs=-rng.random(shape).astype(np.float32),
    )


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), count=st.integers(1, 5), seed=st.integers(0, 99))
def test_shares_are_all_samples_in_order_and_about_equally_large(sizes: list[int], count: int, seed: int) -> None:
    batch = make_batch(sizes, seed=seed)
    parts = shares(batch, count)
    assert [sample for part in parts for sample in part] == list(range(len(batch)))
    assert len(parts) == count
    loads = [int(batch.lengths[part.start : part.stop].sum()) for part in parts]
    assert max(loads) <= batch.tokens_total / count + batch.lengths.max()


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_columns_of_all_shares_are_those_of_the_batch(top_k: int, count: int) -> None:
    batch = replace(make_batch((3, 2)), temperature=0.7)
    parts, expected = [], []
    for share in shares(batch, count):
        requests = score_requests(batch, share, top_k)
        scores = [told(request, sample) for request, sample in zip(requests, share, strict=True)]
        parts.append(columns(batch, share, scores, top_k, 50))
        for request, one in zip(requests, scores, strict=True):
            assert (request.temperature, request.top_k) == (0.7, top_k)
            expected.append((request, one))
    names = ["teacher_logprobs"] + (["teacher_top_tokens", "teacher_top_logprobs"] if top_k else [])
    whole = batch.with_columns(**{name: np.concatenate([part[name] for part in parts]) for name in names})
    for sample, (request, one) in enumerate(expected):
        start, end = whole.cu_seqlens[sample : sample + 2]
        np.testing.assert_array_equal(request.tokens, whole["tokens"][start:end])
        response = slice(start + whole.samples["prompt_length"][sample], end)
        np.testing.assert_array_equal(whole["teacher_logprobs"][response], one.logprobs)
        assert not whole["teacher_logprobs"][start : response.start].any()
        if top_k:
            np.testing.assert_array_equal(whole["teacher_top_tokens"][response], one.top_tokens)
            np.testing.assert_array_equal(whole["teacher_top_logprobs"][response], one.top_logprobs)


def changed(batch: Batch, **fields: Any) -> list[Scores]:
    """Scores of a batch's samples, of which the second is changed."""
    scores = [told(request, 0) for request in score_requests(batch, range(len(batch)), 2)]
    scores[1] = replace(scores[1], **fields)
    return scores


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": np.zeros(1, np.float32)}, r"scored sample 0/1 in columns of the shapes \(\(1,\), "),
        (
            {"top_tokens": np.full((4, 2), 50, np.int32)},
            "finds token 50 likely in sample 0/1, but the policy knows only 50",
        ),
        ({"logprobs": np.full(4, -np.inf, np.float32)}, "of sample 0/1 are not finite numbers"),
        ({"top_logprobs": np.full((4, 2), np.nan, np.float32)}, "of sample 0/1 are not finite numbers"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_with_its_sample(fields: dict[str, Any], message: str) -> None:
    batch = make_batch((3,), seed=2)
    assert batch.lengths[1] - batch.samples["prompt_length"][1] == 4
    with pytest.raises(RunError, match=message):
        columns(batch, range(len(batch)), changed(batch, **fields), 2, 50)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first": 0}, "first must be between 1 and the 3 tokens, got 0"),
        ({"first": 4}, "first must be between 1 and the 3 tokens, got 4"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreRequest(tokens=np.arange(3, dtype=np.int32), **fields)


def test_a_loss_says_how_many_likeliest_tokens_it_reads() -> None:
    said: dict[str, Any] = {"name": "some", "ref": "nowhere:thing", "summary": "It is made up."}
    LossSpec(**said, needs=frozenset({"teacher_top_tokens"}), top_k="k")
    for wrong in ({"needs": frozenset({"teacher_top_tokens"})}, {"top_k": "k"}):
        with pytest.raises(ValueError, match="go together"):
            LossSpec(**said, **wrong)
