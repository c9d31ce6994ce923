"""The engine's numbers against transformers' own forward and generate, for several architectures.

Tolerance: both sides compute in float32 but add in another order (packed matrices, attention over a cache), which moves
log-probabilities of these models by about 1e-6; 5e-5 leaves room for other processors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import (
    CONFIGS,
    FUSED,
    MAX_TOKENS,
    generate,
    make_engine,
    make_folder,
    make_model,
    prompts,
    reference_logprobs,
    requests_of,
)

from miles_core.sample import Sampling
from miles_torch import fused
from miles_torch.attention import Decode, KVCache, Prefill
from miles_torch.engine_model import EngineModel

TOLERANCE = 5e-5


def engine_model(folder: Path, model: Any, max_tokens: int = MAX_TOKENS) -> EngineModel:
    made = EngineModel(folder, device=torch.device("cpu"), dtype=torch.float32, max_tokens=max_tokens)
    state = model.state_dict()
    made.load(list(state), list(state.values()))
    made.finish_load()
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_those_of_a_plain_forward(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    requests = requests_of(prompts(5), Sampling(max_new_tokens=12), samples=2)
    answers = generate(make_folder(tmp_path, model), model, requests)
    for request in requests:
        for completion in answers[request.id]:
            expected = reference_logprobs(model, request.tokens, completion.tokens)
            np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_logprobs_are_those_at_the_temperature_before_any_cut(temperature: float, tmp_path: Path) -> None:
    model = make_model()
    sampling = Sampling(temperature=temperature, top_k=5, top_p=0.8, max_new_tokens=12)
    requests = requests_of(prompts(3), sampling)
    answers = generate(make_folder(tmp_path, model), model, requests)
    for request in requests:
        completion = answers[request.id][0]
        expected = reference_logprobs(model, request.tokens, completion.tokens, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_transformers_generate(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    requests = requests_of(prompts(4, seed=1), Sampling(temperature=0, max_new_tokens=16))
    answers = generate(make_folder(tmp_path, model), model, requests)
    for request in requests:
        tokens = torch.from_numpy(request.tokens.astype(np.int64)).unsqueeze(0)
        expected = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=16, pad_token_id=0
        )
        completion = answers[request.id][0]
        assert completion.tokens.tolist() == expected[0, len(request.tokens) :].tolist()
        np.testing.assert_allclose(
            completion.logprobs, reference_logprobs(model, request.tokens, completion.tokens), atol=TOLERANCE
        )


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_forward_equals_the_models_own(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    folder = make_folder(tmp_path, model)
    lean, own = engine_model(folder, model), engine_model(folder, model)
    assert isinstance(lean._forward, fused.FusedDecoder)
    own._forward = own._own
    tokens = torch.randint(lean.vocabulary, (14,), generator=torch.Generator().manual_seed(3))
    results = []
    with torch.inference_mode():
        for side in (lean, own):
            cache = KVCache()
            cache.reserve(3, 20)
            first = side.prefill(tokens, Prefill(cache, [0, 6, 7, 14], [0, 1, 2]))
            second = side.decode(tokens[:3], Decode(cache, torch.tensor([6, 1, 7]), 8))
            third = side.decode(tokens[3:5], Decode(cache, torch.tensor([7, 2]), 8))
            results.append(torch.cat((first, second, third)))
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - set(FUSED)))
def test_other_architectures_run_their_own_forward(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    made = engine_model(make_folder(tmp_path, model), model)
    assert made._forward == made._own


def test_a_model_of_the_same_shape_with_other_arithmetic_is_told_by_its_numbers(tmp_path: Path) -> None:
    model = make_model("granite")  # scales its residuals
    made = engine_model(make_folder(tmp_path, model), model)
    assert fused.fits(made.module)
    assert made._forward == made._own


def test_without_packed_weights_the_fused_forward_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("qwen2")
    monkeypatch.setattr(fused, "_packs", lambda dtype: False)
    requests = requests_of(prompts(2), Sampling(max_new_tokens=6))
    answers = generate(make_folder(tmp_path, model), model, requests)
    for request in requests:
        completion = answers[request.id][0]
        expected = reference_logprobs(model, request.tokens, completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)


def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(tmp_path: Path) -> None:
    exact = make_model().to(torch.bfloat16).float()
    plain = make_model().to(torch.bfloat16)
    made = EngineModel(
        make_folder(tmp_path, exact), device=torch.device("cpu"), dtype=torch.bfloat16, max_tokens=MAX_TOKENS
    )
    made.load(list(plain.state_dict()), list(plain.state_dict().values()))
    made.finish_load()
    tokens = torch.randint(made.vocabulary, (1, 30), generator=torch.Generator().manual_seed(0))
    cache = KVCache()
    cache.reserve(1, 30)
    with torch.inference_mode():
        expected = exact(tokens).logits[0, -1].log_softmax(-1)
        theirs = plain(tokens).logits[0, -1].float().log_softmax(-1)
        ours = made.prefill(tokens[0], Prefill(cache, [0, 30], [0]))[0].float().log_softmax(-1)
    assert (ours - expected).abs().mean() < 1.5 * (theirs - expected).abs().mean()


def test_the_engine_knows_what_its_options_allow(tmp_path: Path) -> None:
    assert make_engine(tmp_path, max_batch=3).options.max_batch == 3
    with pytest.raises(ValueError, match="max_batch must be at least 1"):
        make_engine(tmp_path, max_batch=0)
