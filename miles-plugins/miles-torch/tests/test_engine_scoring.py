"""What the engine says of given tokens, against transformers' own forward."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import (
    CONFIGS,
    MAX_TOKENS,
    VOCABULARY,
    Gate,
    collect,
    make_folder,
    make_model,
    prompts,
    requests_of,
    running,
)

from miles_core.errors import UserError
from miles_core.roles import EngineContext
from miles_core.sample import Sampling, ScoreRequest, Scores
from miles_torch import scoring
from miles_torch.engine import TorchEngine
from miles_torch.engine_options import EngineOptions

TOLERANCE = 5e-5
"""Both sides add in another order; see test_engine_numbers."""


def asked(count: int = 6, *, top_k: int = 4, temperature: float = 1.0) -> list[ScoreRequest]:
    """Requests of different lengths, of which different parts are scored."""
    return [
        ScoreRequest(tokens=tokens, first=1 + index % len(tokens), top_k=top_k, temperature=temperature)
        for index, tokens in enumerate(prompts(count, seed=3, longest=30))
    ]


def score(folder: Path, model: Any, requests: Sequence[ScoreRequest]) -> list[Scores]:
    async def run() -> list[Scores]:
        async with running(folder, model) as engine:
            return await engine.score(requests)

    return asyncio.run(run())


def check(model: Any, requests: Sequence[ScoreRequest], answers: Sequence[Scores]) -> None:
    for request, scores in zip(requests, answers, strict=True):
        tokens = torch.from_numpy(request.tokens.astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, request.first - 1 : -1].float()
        expected = (logits / request.temperature).log_softmax(-1)
        own = expected.gather(1, tokens[request.first :, None])[:, 0]
        np.testing.assert_allclose(scores.logprobs, own, atol=TOLERANCE)
        top = expected.topk(request.top_k)
        np.testing.assert_allclose(scores.top_logprobs, top.values, atol=TOLERANCE)
        picked = expected.gather(1, torch.from_numpy(scores.top_tokens.astype(np.int64)))
        np.testing.assert_allclose(picked, top.values, atol=TOLERANCE)
        assert (scores.logprobs.dtype.name, scores.top_tokens.dtype.name) == ("float32", "int32")


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_a_plain_forward(name: str, tmp_path: Path) -> None:
    model, requests = make_model(name), asked()
    check(model, requests, score(make_folder(tmp_path, model), model, requests))


def test_requests_have_temperatures_and_top_tokens_of_their_own(tmp_path: Path) -> None:
    model = make_model()
    requests = [*asked(2, top_k=0), *asked(2, top_k=VOCABULARY, temperature=0.6), *asked(2, top_k=1, temperature=1.9)]
    answers = score(make_folder(tmp_path, model), model, requests)
    check(model, requests, answers)
    assert answers[0].top_tokens.shape == (len(requests[0].tokens) - requests[0].first, 0)


def test_a_call_may_be_larger_than_a_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = make_model(), asked(9)
    monkeypatch.setattr(scoring, "PART_TOKENS", 40)
    monkeypatch.setattr(scoring, "PART_LOGITS", 25 * VOCABULARY)
    monkeypatch.setattr(scoring, "ROWS", 7)
    sizes = [len(part) for part in scoring._parts(requests, VOCABULARY)]
    assert len(sizes) > 2
    assert max(sizes) > 1
    check(model, requests, score(make_folder(tmp_path, model), model, requests))


def test_a_request_may_score_nothing(tmp_path: Path) -> None:
    model = make_model()
    whole = ScoreRequest(tokens=np.array([3, 4], np.int32), first=2, top_k=2)
    (scores,) = score(make_folder(tmp_path, model), model, [whole])
    assert scores.logprobs.shape == (0,)
    assert scores.top_logprobs.shape == (0, 2)
    assert score(make_folder(tmp_path, model), model, []) == []


def test_scoring_and_generating_leave_each_other_alone(tmp_path: Path) -> None:
    """Both at once give what each gives by itself, bit for bit."""
    model = make_model()
    requests, generated = asked(), requests_of(prompts(4), Sampling(max_new_tokens=16))

    async def run(together: bool) -> tuple[Any, Any]:
        async with running(make_folder(tmp_path, model), model) as engine:
            if not together:
                return await collect(engine, generated), await engine.score(requests)
            gate = Gate(engine, steps=5)
            generating = asyncio.create_task(collect(engine, generated))
            await gate.reached()
            scoring_ = asyncio.create_task(engine.score(requests))
            await asyncio.sleep(0)
            gate.open()
            return await generating, await scoring_

    (alone, scores), (beside, others) = asyncio.run(run(False)), asyncio.run(run(True))
    for one, other in zip(scores, others, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
    for name, completions in alone.items():
        np.testing.assert_array_equal(completions[0].logprobs, beside[name][0].logprobs)


def frozen(folder: Path) -> TorchEngine:
    context = EngineContext(
        model=folder, index=0, gpus=0, threads=1, dtype="float32", max_tokens=MAX_TOKENS, seed=0, folder=folder,
        frozen=True,
    )  # fmt: skip
    return TorchEngine(EngineOptions(), context)


@pytest.mark.parametrize("name", ["qwen3", "deepseek-v3"])
def test_a_frozen_engine_has_the_weights_of_its_folder(name: str, tmp_path: Path) -> None:
    model, requests = make_model(name), asked(3)
    model.save_pretrained(tmp_path)

    async def run() -> list[Scores]:
        engine = frozen(tmp_path)
        await engine.start()
        try:
            return await engine.score(requests)
        finally:
            await engine.stop()

    check(model, requests, asyncio.run(run()))


def test_a_frozen_engine_without_weights_is_refused(tmp_path: Path) -> None:
    engine = frozen(make_folder(tmp_path, make_model()))
    with pytest.raises(UserError, match="has no weights"):
        asyncio.run(engine.start())


def test_a_frozen_engine_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    model = make_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lacks the tensor model\.norm\.weight"):
        asyncio.run(frozen(tmp_path).start())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ScoreRequest(tokens=np.array([1, VOCABULARY], np.int32)), f"token {VOCABULARY} cannot be scored"),
        (ScoreRequest(tokens=np.array([1, -2], np.int32)), "token -2 cannot be scored"),
        (ScoreRequest(tokens=np.zeros(MAX_TOKENS + 1, np.int32)), f"model.max_tokens is {MAX_TOKENS}"),
        (ScoreRequest(tokens=np.array([1, 2], np.int32), top_k=VOCABULARY + 1), "a vocabulary of only"),
    ],
)
def test_what_cannot_be_scored_is_refused_and_the_engine_goes_on(
    request_: ScoreRequest, message: str, tmp_path: Path
) -> None:
    model = make_model()

    async def run() -> list[Scores]:
        async with running(make_folder(tmp_path, model), model) as engine:
            with pytest.raises(UserError, match=message):
                await engine.score([request_])
            return await engine.score(asked(1))

    check(model, asked(1), asyncio.run(run()))
