"""A batch as a teacher's engines see it: which samples each scores, what it is asked, and the columns that come of it.

Shapes: T all tokens of a share of the batch; R response tokens of a sample; K the teacher's likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles_core.errors import RunError
from miles_core.run.checks import sample_name
from miles_core.sample import Batch, ScoreRequest, Scores

Share = range
"""Consecutive samples of a batch."""


def shares(batch: Batch, count: int) -> list[Share]:
    """The batch's samples in `count` parts of about equally many tokens, in order; a part may be empty."""
    cuts = [round(part * batch.tokens_total / count) for part in range(count + 1)]
    bounds = np.searchsorted(batch.cu_seqlens, cuts).tolist()
    bounds[-1] = len(batch)
    return [range(first, last) for first, last in pairwise(bounds)]


def score_requests(batch: Batch, share: Share, top_k: int) -> list[ScoreRequest]:
    """One for each sample of a share: its response, at the temperature of the sampling."""
    return [
        ScoreRequest(
            tokens=batch["tokens"][batch.cu_seqlens[sample] : batch.cu_seqlens[sample + 1]],
            first=int(batch.samples["prompt_length"][sample]),
            top_k=top_k,
            temperature=batch.temperature,
        )
        for sample in share
    ]


def columns(
    batch: Batch, share: Share, scores: Sequence[Scores], top_k: int, vocabulary: int | None
) -> Mapping[str, NDArray[Any]]:
    """The share's part of the teacher's columns, [T] or [T, K]; 0 in prompts.

    vocabulary: how many tokens the policy knows. Raises `RunError`, naming the sample, if the teacher finds a token
    likely that the policy does not know, or gives something else than was asked for.
    """
    start = batch.cu_seqlens[share.start]
    total = int(batch.cu_seqlens[share.stop] - start)
    found: dict[str, NDArray[Any]] = {"teacher_logprobs": np.zeros(total, np.float32)}
    if top_k:
        found["teacher_top_tokens"] = np.zeros((total, top_k), np.int32)
        found["teacher_top_logprobs"] = np.zeros((total, top_k), np.float32)
    for sample, told in zip(share, scores, strict=True):
        _check(batch, sample, told, top_k, vocabulary)
        response = slice(
            batch.cu_seqlens[sample] + batch.samples["prompt_length"][sample] - start,
            batch.cu_seqlens[sample + 1] - start,
        )
        found["teacher_logprobs"][response] = told.logprobs
        if top_k:
            found["teacher_top_tokens"][response] = told.top_tokens
            found["teacher_top_logprobs"][response] = told.top_logprobs
    return found


def _check(batch: Batch, sample: int, told: Scores, top_k: int, vocabulary: int | None) -> None:
    length = int(batch.lengths[sample] - batch.samples["prompt_length"][sample])
    shapes = told.logprobs.shape, told.top_tokens.shape, told.top_logprobs.shape
    if shapes != ((length,), (length, top_k), (length, top_k)):
        raise RunError(
            f"the teacher's engine scored {sample_name(batch, sample)} in columns of the shapes {shapes}, for {length} "
            f"response tokens and {top_k} likeliest ones"
        )
    if not (np.isfinite(told.logprobs).all() and np.isfinite(told.top_logprobs).all()):
        raise RunError(f"the teacher's log-probabilities of {sample_name(batch, sample)} are not finite numbers")
    largest = int(told.top_tokens.max(initial=0))
    if vocabulary is not None and largest >= vocabulary:
        raise RunError(
            f"the teacher finds token {largest} likely in {sample_name(batch, sample)}, but the policy knows only "
            f"{vocabulary}; lower the loss's top_k, or choose models that have the same vocabulary"
        )
