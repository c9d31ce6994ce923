"""Weights of a colocated trainer: the server reads them where the trainer has them, here in shared memory."""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from handles_rank import send_as
from sglang_kit import SharedServer, ask, buckets_of, collect, context_of, layout_of, with_engine

from miles_core.errors import RunError
from miles_core.roles import Bucket
from miles_core.testing.models import make_model, response_logprobs, trainer_context, weights_of
from miles_sglang import handles
from miles_sglang.engine import SglangEngine
from miles_sglang.handles import Receiver, Sender

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PROMPT = [7, 8, 9, 10, 11]


async def meet(engine: SglangEngine) -> tuple[Sender, Receiver]:
    sender = Sender(replace(trainer_context(Path(), 0), verify=True, layout="colocated"), 1)
    receiver = Receiver(engine.context, 1, sender.open(), layout_of(buckets_of(make_model())))
    await asyncio.gather(asyncio.to_thread(sender.connect), asyncio.to_thread(receiver.connect))
    return sender, receiver


async def transfer(ends: tuple[Sender, Receiver], engine: SglangEngine, buckets: list[Bucket]) -> None:
    sender, receiver = ends
    send = partial(sender.send, iter(buckets))
    await asyncio.gather(asyncio.to_thread(send), asyncio.to_thread(receiver.receive, engine.load))


def rounded(model: Any) -> Any:
    """With weights that bfloat16 holds exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


def memory_files() -> list[str]:
    """Of this process, what is open for handles."""
    paths = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    return [path for path in paths if "miles-weights" in path]


def test_a_server_that_sleeps_wakes_with_the_weights_in_the_trainers_memory(server: SharedServer) -> None:
    """A turn as a colocated run takes it, with float32 and with bfloat16."""

    async def use(engine: SglangEngine) -> Any:
        ends = await meet(engine)
        answers = []
        for version, dtype in ((1, torch.float32), (2, torch.bfloat16)):
            await engine.sleep()
            late = asyncio.create_task(collect(engine, [ask("late", PROMPT, max_new_tokens=8)]))
            await engine.wake("weights")
            made = [replace(bucket, flat=bucket.flat.to(dtype)) for bucket in buckets_of(weights(version))]
            await transfer(ends, engine, made)
            engine.set_version(version)
            early = late.done()
            await engine.wake("all")
            answers.append((early, version, (await late)["late"][0]))
        ends[1].close()
        ends[0].close()
        return answers

    weights: Callable[[int], Any] = lambda version: rounded(make_model(seed=version))  # noqa: E731
    for early, version, completion in with_engine(server, use):
        assert not early
        assert set(completion.versions.tolist()) == {version}
        expected = response_logprobs(weights(version), np.array(PROMPT, np.int32), completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    assert memory_files() == []


def test_a_bucket_is_kept_until_it_is_loaded_and_one_more_is_made_meanwhile(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> Any:
        sender, receiver = await meet(engine)
        buckets = buckets_of(make_model())
        made: list[int] = []

        def exported() -> Any:
            for number, bucket in enumerate(buckets):
                made.append(number)
                yield bucket

        sending = asyncio.create_task(asyncio.to_thread(sender.send, exported()))
        await asyncio.sleep(0.5)
        before = (list(made), len(memory_files()), sending.done())
        await asyncio.to_thread(receiver.receive, engine.load)
        await sending
        return before, made

    before, made = with_engine(server, use)
    assert before == ([0, 1], 2, False)
    assert made == [0, 1, 2]
    assert memory_files() == []


def test_what_a_server_has_loaded_otherwise_is_found_out(server: SharedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaged(handles.HostHandle):
        def __init__(self, flat: torch.Tensor) -> None:
            damaged = flat.clone()
            damaged[100] ^= 1
            super().__init__(damaged)

    async def use(engine: SglangEngine) -> None:
        ends = await meet(engine)
        monkeypatch.setattr(handles, "HostHandle", Damaged)
        sending = asyncio.create_task(asyncio.to_thread(ends[0].send, iter(buckets_of(make_model()))))
        with pytest.raises(RunError, match=r"what engine 0 has loaded of model.embed_tokens.weight … is not what the"):
            await asyncio.to_thread(ends[1].receive, engine.load)
        with pytest.raises(RunError, match="the server of the trainer's rank 0 has not loaded all"):
            await sending
        assert memory_files() == []

    with_engine(server, use)


def test_each_rank_hands_the_bytes_of_the_first_to_its_rank_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of two ranks, which here only notes what it is sent."""
    arrived: list[list[dict[str, torch.Tensor]]] = []

    def ask_stand_in(server: Any, path: str, *, serialized_named_tensors: list[str], **rest: Any) -> str:
        arrived.append([opened(payload) for payload in serialized_named_tensors])
        return "Success"

    def opened(payload: str) -> dict[str, torch.Tensor]:
        found = pickle.loads(base64.b64decode(payload))
        parts = {one.name: (found["flattened_tensor"][one.start_idx : one.end_idx], one) for one in found["metadata"]}
        return {name: raw.view(one.dtype).reshape(one.shape).clone() for name, (raw, one) in parts.items()}

    monkeypatch.setattr(handles, "beside", lambda context: SimpleNamespace(name="engine 0", ranks=2))
    monkeypatch.setattr(handles, "ask", ask_stand_in)
    processes = multiprocessing.get_context("spawn")
    pipes = [processes.Pipe() for _ in range(2)]
    ranks = [processes.Process(target=send_as, args=(rank, str(tmp_path), pipes[rank][1])) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert pipes[0][0].poll(60), [rank.exitcode for rank in ranks]
    address = pipes[0][0].recv()
    receiver = Receiver(context_of(tmp_path), 1, address, layout_of(buckets_of(make_model())))
    receiver.connect()
    receiver._verify = False
    receiver.receive(lambda names, tensors: None)
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    expected = {name: tensor.bfloat16() for name, tensor in weights_of(make_model()).items()}
    for place in range(2):
        got = {name: tensor for bucket in arrived for name, tensor in bucket[place].items()}
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
