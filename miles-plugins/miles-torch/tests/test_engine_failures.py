"""Aborts, cancelled callers, and failures on the engine's thread: nobody waits for ever."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import Gate, collect, generate, make_engine, make_folder, make_model, prompts, requests_of, running

from miles_core.errors import RunError, UserError
from miles_core.roles import EngineContext
from miles_core.sample import Sampling
from miles_torch.engine import TorchEngine
from miles_torch.engine_options import EngineOptions

REQUESTS = requests_of(prompts(4, seed=3), Sampling(max_new_tokens=12), samples=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture
def folder(tmp_path: Path, model: Any) -> Path:
    return make_folder(tmp_path / "model", model)


@pytest.mark.parametrize("slots", [3, 64])
def test_aborted_requests_end_with_what_they_have_and_the_others_go_on(slots: int, folder: Path, model: Any) -> None:
    async def run() -> Any:
        async with running(folder, model, max_batch=slots) as engine:
            gate = Gate(engine, 4)
            task = asyncio.create_task(collect(engine, REQUESTS))
            await gate.reached()
            abort = asyncio.create_task(engine.abort(["1", "3", "unheard of"]))
            await asyncio.sleep(0)
            gate.open()
            await abort
            return await task

    answers, whole = asyncio.run(run()), generate(folder, model, REQUESTS)
    begun = {3: {"1": [5, 0], "3": [0, 0]}, 64: {"1": [5, 5], "3": [5, 5]}}[slots]
    for name, completions in answers.items():
        for index, completion in enumerate(completions):
            full = whole[name][index].tokens.tolist()
            if name in begun:
                assert completion.status == "aborted"
                assert completion.tokens.tolist() == full[: begun[name][index]]
            else:
                assert completion.status == "truncated"
                assert completion.tokens.tolist() == full


def test_all_requests_can_be_aborted_while_the_engine_is_paused(folder: Path, model: Any) -> None:
    async def run() -> None:
        async with running(folder, model) as engine:
            await engine.pause("drain")
            task = asyncio.create_task(collect(engine, REQUESTS))
            await asyncio.sleep(0.01)
            await engine.abort()
            assert all(each.status == "aborted" for parts in (await task).values() for each in parts)

    asyncio.run(run())


def test_a_caller_that_leaves_frees_its_slots(folder: Path, model: Any) -> None:
    async def run() -> None:
        async with running(folder, model, max_batch=2) as engine:
            gate = Gate(engine, 3)
            task = asyncio.create_task(collect(engine, REQUESTS))
            await gate.reached()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open()
            others = requests_of(prompts(1), Sampling(max_new_tokens=2))
            assert len((await collect(engine, others))["0"][0].tokens) == 2
            assert not engine._scheduler._jobs

    asyncio.run(run())


def test_a_request_id_may_be_used_again_only_when_it_is_answered(folder: Path, model: Any) -> None:
    async def run() -> None:
        async with running(folder, model) as engine:
            await engine.pause("drain")
            task = asyncio.create_task(collect(engine, REQUESTS))
            await asyncio.sleep(0.01)
            with pytest.raises(UserError, match="'0' is in flight already"):
                await collect(engine, REQUESTS[:1])
            await engine.resume()
            assert len(await task) == 4
            assert len(await collect(engine, REQUESTS)) == 4

    asyncio.run(run())


def test_a_failure_on_the_thread_reaches_everyone(folder: Path, model: Any) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("out of luck")

    async def run() -> None:
        async with running(folder, model) as engine:
            assert engine._model is not None
            gate = Gate(engine, 3)
            tasks = [asyncio.create_task(collect(engine, [request])) for request in REQUESTS]
            await gate.reached()
            engine._model.decode = broken  # type: ignore[method-assign, assignment]
            tasks.append(asyncio.create_task(engine.pause("drain")))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            gate.open()
            for task in tasks:
                with pytest.raises(RunError, match="engine 0 failed: ZeroDivisionError: out of luck") as caught:
                    await asyncio.wait_for(task, 30)
                assert "in broken" in (caught.value.cause or "")
            for later in (collect(engine, REQUESTS), engine.pause("abort"), engine.resume(), engine.abort()):
                with pytest.raises(RunError, match="out of luck"):
                    await asyncio.wait_for(later, 30)

    asyncio.run(run())


def test_a_failure_while_an_order_is_obeyed_reaches_who_gave_it_and_everyone_else(folder: Path, model: Any) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("out of luck")

    async def run() -> None:
        async with running(folder, model) as engine:
            assert engine._scheduler._generator is not None
            gate = Gate(engine, 3)
            tasks: list[asyncio.Task[Any]] = [asyncio.create_task(collect(engine, REQUESTS))]
            await gate.reached()
            engine._scheduler._generator.remove = broken  # type: ignore[method-assign, assignment]
            tasks += [asyncio.create_task(engine.abort()), asyncio.create_task(engine.resume())]
            await asyncio.sleep(0)
            gate.open()
            for task in tasks:
                with pytest.raises(RunError, match="out of luck"):
                    await asyncio.wait_for(task, 30)

    asyncio.run(run())


def test_weights_that_give_nans_are_reported(folder: Path, model: Any) -> None:
    async def run() -> None:
        async with running(folder) as engine:
            state = model.state_dict()
            engine.load(list(state), [torch.full_like(tensor, torch.nan) for tensor in state.values()])
            engine.set_version(3)
            with pytest.raises(RunError, match="weights of version 3 give log-probabilities that are not finite"):
                await asyncio.wait_for(collect(engine, REQUESTS), 30)

    asyncio.run(run())


def test_stopping_ends_what_is_in_flight_and_refuses_what_comes_later(folder: Path, model: Any) -> None:
    async def run() -> None:
        engine = make_engine(folder)
        await engine.start()
        task = asyncio.create_task(collect(engine, REQUESTS))
        await asyncio.sleep(0.01)
        await engine.stop()
        assert all(each.status == "aborted" for parts in (await task).values() for each in parts)
        assert not engine._scheduler._thread.is_alive()
        with pytest.raises(RunError, match="engine 0 is stopped"):
            await collect(engine, REQUESTS)
        await engine.stop()

    asyncio.run(run())


def test_an_engine_that_was_never_started_can_be_stopped(folder: Path) -> None:
    asyncio.run(make_engine(folder).stop())


def test_a_model_with_fewer_positions_than_asked_for_is_refused(folder: Path) -> None:
    async def run() -> None:
        engine = make_engine(folder, max_tokens=257)
        with pytest.raises(UserError, match="max_tokens is 257, but the model has only 256 positions"):
            await engine.start()
        await engine.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        {"model_type": "bert", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"model_type": "gptj", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        {"model_type": "bloom", "vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        {
            "model_type": "qwen3_next", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2,
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ],
    ids=lambda config: config["model_type"],
)  # fmt: skip
def test_a_model_that_does_not_work_with_a_plain_cache_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))

    async def run() -> None:
        engine = make_engine(tmp_path)
        with pytest.raises(UserError, match="the engine 'torch' cannot generate with"):
            await engine.start()
        await engine.stop()

    asyncio.run(run())


def test_one_engine_uses_one_device(folder: Path) -> None:
    context = EngineContext(
        model=folder, index=0, gpus=2, threads=1, dtype="float32", max_tokens=64, seed=0, folder=folder
    )
    with pytest.raises(UserError, match=r"engine.gpus is 2.*Set engine.count for more"):
        TorchEngine(EngineOptions(), context)
