"""Scoring: how likely given tokens are, by forwards over several requests packed end to end.

Nothing is kept in a cache, and logits are made only where a token is scored. In a list of requests the same ones always
run together, so the same list gives the same numbers, bit for bit.

Shapes: R scored tokens; V vocabulary; K top tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from miles_core.errors import UserError
from miles_core.sample import FloatArray, IntArray, ScoreRequest, Scores
from miles_torch.attention import Prefill
from miles_torch.engine_model import EngineModel

PART_TOKENS = 8192
"""Most tokens of one forward, unless one request alone has more; bounds the memory of activations."""
PART_LOGITS = 2**28
"""Most logits of one forward, with the same exception."""
ROWS = 1024
"""Rows of logits that are turned into float32 at once."""

_Arrays = tuple[FloatArray, IntArray, FloatArray]


def score(model: EngineModel, requests: Sequence[ScoreRequest], max_tokens: int) -> list[Scores]:
    """One answer a request, in order. Raises `UserError` for a request that cannot be."""
    for request in requests:
        _check(request, model.vocabulary, max_tokens)
    parts = _parts(requests, model.vocabulary)
    return [scores for part in parts for scores in _score(model, part)]


def _check(request: ScoreRequest, vocabulary: int, max_tokens: int) -> None:
    tokens = request.tokens
    if len(tokens) > max_tokens:
        raise UserError(
            f"{len(tokens)} tokens cannot be scored: model.max_tokens is {max_tokens}. Raise it, or shorten them."
        )
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise UserError(
            f"token {tokens.max() if tokens.max() >= vocabulary else tokens.min()} cannot be scored: the model has a "
            f"vocabulary of {vocabulary}. Do both models have the same tokenizer?"
        )
    if request.top_k > vocabulary:
        raise UserError(f"top_k is {request.top_k}, but the model has a vocabulary of only {vocabulary}. Lower it.")


def _parts(requests: Sequence[ScoreRequest], vocabulary: int) -> list[list[ScoreRequest]]:
    """Requests in order, cut so that no part is too large."""
    parts: list[list[ScoreRequest]] = []
    tokens = logits = 0
    for request in requests:
        own = len(request.tokens), (len(request.tokens) - request.first) * vocabulary
        if not parts or tokens + own[0] > PART_TOKENS or logits + own[1] > PART_LOGITS:
            parts.append([])
            tokens = logits = 0
        parts[-1].append(request)
        tokens, logits = tokens + own[0], logits + own[1]
    return parts


def _score(model: EngineModel, part: Sequence[ScoreRequest]) -> list[Scores]:
    bounds = [0, *accumulate(len(request.tokens) for request in part)]
    counts = [len(request.tokens) - request.first for request in part]
    packed = np.concatenate([request.tokens for request in part]).astype(np.int64)
    scored = np.concatenate(
        [np.arange(start + request.first, end) for request, (start, end) in zip(part, pairwise(bounds), strict=True)]
    )
    tokens, targets, before = (torch.from_numpy(each).to(model.device) for each in (packed, packed[scored], scored - 1))
    logits = model.prefill(tokens, Prefill(cache=None, bounds=bounds, rows=range(len(part))), before)
    temperatures = np.repeat([request.temperature for request in part], counts).astype(np.float32)
    logprobs, top_tokens, top_logprobs = _logprobs(
        logits, targets, torch.from_numpy(temperatures).to(model.device), max(request.top_k for request in part)
    )
    answers = []
    for request, (start, end) in zip(part, pairwise([0, *accumulate(counts)]), strict=True):
        answers.append(
            Scores(
                logprobs=logprobs[start:end],
                top_tokens=top_tokens[start:end, : request.top_k],
                top_logprobs=top_logprobs[start:end, : request.top_k],
            )
        )
    return answers


def _logprobs(logits: Tensor, targets: Tensor, temperatures: Tensor, top_k: int) -> _Arrays:
    """From logits [R, V]: log-probabilities of the targets [R]; the likeliest tokens and theirs, [R, K]."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, max(len(targets), 1), ROWS):
        rows = slice(start, start + ROWS)
        scaled = logits[rows].float() / temperatures[rows, None]
        total = scaled.logsumexp(-1, keepdim=True)
        top = scaled.topk(top_k)
        found.append((scaled.gather(1, targets[rows, None]) - total, top.indices, top.values - total))
    logprobs, tokens, top_logprobs = (torch.cat(each).cpu() for each in zip(*found, strict=True))
    return logprobs[:, 0].numpy(), tokens.int().numpy(), top_logprobs.numpy()
