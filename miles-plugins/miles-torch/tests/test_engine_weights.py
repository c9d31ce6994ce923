"""Weights that arrive while an engine generates, in each pause mode."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import (
    Gate,
    collect,
    generate,
    make_folder,
    make_model,
    prompts,
    publish,
    reference_in_place,
    reference_logprobs,
    requests_of,
    running,
    same,
)
from safetensors.torch import load_file
from transformers import AutoConfig

from miles_core.errors import UserError
from miles_core.roles import PauseMode
from miles_core.sample import Completion, Sampling
from miles_core.testing.models import randomised
from miles_torch.engine import TorchEngine
from miles_torch.engine_model import EngineModel

TOLERANCE = 5e-5
STEPS = 5
"""Steps before the pause: a sequence that entered at once has one token more, from its prefill."""


@pytest.fixture(scope="module")
def old() -> Any:
    return make_model(seed=0)


@pytest.fixture(scope="module")
def new() -> Any:
    return make_model(seed=1)


@pytest.fixture
def folder(tmp_path: Path, old: Any) -> Path:
    return make_folder(tmp_path / "model", old)


REQUESTS = requests_of(prompts(4, seed=3), Sampling(max_new_tokens=12), samples=2)


def interrupted(folder: Path, old: Any, new: Any, mode: PauseMode, slots: int = 64) -> dict[str, list[Completion]]:
    """All completions when `new` is published as version 1 in the middle of a wave."""

    async def publish_new(engine: TorchEngine) -> None:
        gate = Gate(engine, STEPS)
        await gate.reached()
        pause = asyncio.create_task(engine.pause(mode))
        await asyncio.sleep(0)  # the order is posted while the thread stands
        gate.open()
        await pause
        publish(engine, new, 1)
        await engine.resume()

    async def run() -> dict[str, list[Completion]]:
        async with running(folder, old, max_batch=slots) as engine:
            answers, _ = await asyncio.gather(collect(engine, REQUESTS), publish_new(engine))
            assert engine.version == 1
            return answers

    return asyncio.run(run())


def test_drain_finishes_what_runs_and_gives_the_rest_to_the_new_weights(folder: Path, old: Any, new: Any) -> None:
    answers = interrupted(folder, old, new, "drain", slots=5)
    before, after = generate(folder, old, REQUESTS), generate(folder, new, REQUESTS)
    versions = []
    for request in REQUESTS:
        for index, completion in enumerate(answers[request.id]):
            version = completion.versions[0]
            assert (completion.versions == version).all()
            expected = (before, after)[version][request.id][index]
            assert completion.tokens.tolist() == expected.tokens.tolist()
            versions.append(version)
    assert versions == [0] * 5 + [1] * 3


def test_abort_returns_what_runs_as_it_is(folder: Path, old: Any, new: Any) -> None:
    answers = interrupted(folder, old, new, "abort", slots=5)
    whole = generate(folder, old, REQUESTS)
    lengths = {request.id: [len(each.tokens) for each in answers[request.id]] for request in REQUESTS}
    # The third request is half in: it ends whole. The fourth has not begun, and is for the new weights.
    assert lengths == {"0": [6, 6], "1": [6, 6], "2": [6, 0], "3": [12, 12]}
    for request in REQUESTS[:3]:
        for completion, full in zip(answers[request.id], whole[request.id], strict=True):
            assert completion.status == "aborted"
            assert completion.tokens.tolist() == full.tokens[: len(completion.tokens)].tolist()
    assert all((each.versions == 1).all() and each.status == "truncated" for each in answers["3"])


@pytest.mark.parametrize("slots", [3, 64])
def test_retract_keeps_tokens_and_goes_on_as_the_new_weights_would(
    slots: int, folder: Path, old: Any, new: Any
) -> None:
    answers = interrupted(folder, old, new, "retract", slots=slots)
    whole = generate(folder, old, REQUESTS)
    parts = [(request, index) for request in REQUESTS for index in range(2)]
    for place, (request, index) in enumerate(parts):
        completion = answers[request.id][index]
        kept = STEPS + 1 if place < slots else 0
        assert completion.versions.tolist() == [0] * kept + [1] * (12 - kept)
        assert completion.tokens[:kept].tolist() == whole[request.id][index].tokens[:kept].tolist()
        by_old = reference_logprobs(old, request.tokens, completion.tokens)[:kept]
        by_new = reference_logprobs(new, request.tokens, completion.tokens)[kept:]
        np.testing.assert_allclose(completion.logprobs, np.concatenate((by_old, by_new)), atol=TOLERANCE)


def test_in_place_goes_on_with_the_old_cache_and_the_new_weights(folder: Path, old: Any, new: Any) -> None:
    answers = interrupted(folder, old, new, "in-place")
    for request in REQUESTS:
        for completion in answers[request.id]:
            assert completion.versions.tolist() == [0] * (STEPS + 1) + [1] * (11 - STEPS)
            expected = reference_in_place(old, new, request.tokens, completion.tokens, STEPS + 1)
            np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)
            # And that is not what either model alone would say.
            for model in (old, new):
                alone = reference_logprobs(model, request.tokens, completion.tokens).numpy()
                assert np.abs(alone[STEPS + 1 :] - completion.logprobs[STEPS + 1 :]).max() > 0.01


def test_in_place_computes_a_prompt_again_for_a_sibling_that_enters_later(folder: Path, old: Any, new: Any) -> None:
    answers = interrupted(folder, old, new, "in-place", slots=1)
    for request in REQUESTS:
        for completion in answers[request.id]:
            if (completion.versions == 1).all():
                expected = reference_logprobs(new, request.tokens, completion.tokens)
                np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["drain", "abort", "retract", "in-place"])
def test_an_idle_engine_pauses_at_once_and_later_requests_wait(mode: PauseMode, folder: Path, old: Any) -> None:
    async def run() -> None:
        async with running(folder, old) as engine:
            await engine.pause(mode)
            await engine.pause("abort")
            task = asyncio.create_task(collect(engine, REQUESTS))
            await asyncio.sleep(0.05)
            assert not task.done()
            await engine.resume()
            assert all(each.status == "truncated" for parts in (await task).values() for each in parts)

    asyncio.run(run())


def test_sleeping_gives_the_cache_back_and_changes_nothing(folder: Path, old: Any) -> None:
    async def run() -> dict[str, list[Completion]]:
        async with running(folder, old) as engine:
            gate = Gate(engine, STEPS)
            task = asyncio.create_task(collect(engine, REQUESTS))
            await gate.reached()
            sleep = asyncio.create_task(engine.sleep())
            await asyncio.sleep(0)
            gate.open()
            await sleep
            assert engine._scheduler._generator is not None
            assert not engine._scheduler._generator.cache.layers
            await asyncio.sleep(0.02)
            assert not task.done()
            await engine.wake()
            return await task

    slept, plain = asyncio.run(run()), generate(folder, old, REQUESTS)
    for request in REQUESTS:
        for one, other in zip(slept[request.id], plain[request.id], strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_tensor_may_come_under_any_of_its_names_or_all(name: str, folder: Path, old: Any) -> None:
    plain = generate(folder, old, REQUESTS[:1])

    async def run() -> None:
        async with running(folder) as engine:
            state = old.state_dict()
            for version, left_out in enumerate((None, name)):
                engine.load([each for each in state if each != left_out], [state[x] for x in state if x != left_out])
                engine.set_version(version)
                answers = await collect(engine, REQUESTS[:1])
                assert answers["0"][0].tokens.tolist() == plain["0"][0].tokens.tolist()

    asyncio.run(run())


def test_wrong_weights_are_named(folder: Path, old: Any) -> None:
    async def run() -> None:
        async with running(folder) as engine:
            norm = old.state_dict()["model.norm.weight"]
            with pytest.raises(UserError, match=r"no tensor 'model.nrm.weight'. Did you mean 'model.norm.weight'"):
                engine.load(["model.nrm.weight"], [norm])
            with pytest.raises(UserError, match=r"'model.norm.weight' has shape \[31\]; the engine's model has \[32\]"):
                engine.load(["model.norm.weight"], [norm[1:]])
            engine.load(["model.norm.weight"], [norm])
            with pytest.raises(UserError, match=r"34 tensors .* not among the weights: .* and 29 more"):
                engine.set_version(0)
            assert engine.version == -1

    asyncio.run(run())


def test_a_version_must_be_complete_every_time(folder: Path, old: Any, new: Any) -> None:
    async def run() -> None:
        async with running(folder, old) as engine:
            state = new.state_dict()
            names = [name for name in state if name != "model.norm.weight"]
            engine.load(names, [state[name] for name in names])
            with pytest.raises(UserError, match=r"1 tensors .*: model.norm.weight"):
                engine.set_version(1)

    asyncio.run(run())


class Hooks:
    """Hears what the engine tells the run's callbacks."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def engine_started(self, context: Any) -> None:
        self.heard.append(("started", context.index))

    def weights_received(self, context: Any, version: int) -> None:
        self.heard.append(("weights", context.index, version))


def test_callbacks_hear_of_the_start_and_of_each_version(folder: Path, old: Any) -> None:
    hooks = Hooks()

    async def run() -> None:
        async with running(folder, old, hooks=hooks) as engine:
            publish(engine, old, 7)

    asyncio.run(run())
    assert hooks.heard == [("started", 0), ("weights", 0, 0), ("weights", 0, 7)]


def test_the_same_weights_again_change_no_bit(folder: Path, old: Any) -> None:
    async def run() -> None:
        async with running(folder, old) as engine:
            first = await collect(engine, REQUESTS)
            publish(engine, old, 0)
            second = await collect(engine, REQUESTS)
            assert all(same(*pair) for name in first for pair in zip(first[name], second[name], strict=True))

    asyncio.run(run())


EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_key_value_heads": 2, "head_dim": 8, "norm_topk_prob": True},
    "glm4_moe": {"n_routed_experts": 4, "num_key_value_heads": 2, "head_dim": 8, "first_k_dense_replace": 1},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_come_one_by_one_as_in_files_or_together(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": None}
    fields = {**sizes, "num_attention_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **EXPERTS[kind]}
    model = randomised(AutoConfig.for_model(kind, **fields), torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert expert in files
    engine = EngineModel(tmp_path, device=torch.device("cpu"), dtype=torch.float32, max_tokens=32)
    further = {"model.layers.2.eh_proj.weight": torch.ones(2, 3)}  # of a layer that predicts a second token
    engine.load([*files, *further], [*files.values(), *further.values()])
    engine.finish_load()
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in engine.module.state_dict().items())
    engine.load([name for name in files if name != expert], [files[name] for name in files if name != expert])
    with pytest.raises(UserError, match=f"1 tensors .* not among the weights: {expert}"):
        engine.finish_load()
    engine.load(list(model.state_dict()), list(model.state_dict().values()))
    engine.finish_load()
