"""Weights on their way from a trainer's process into a real server, over gloo."""

from __future__ import annotations

import asyncio
import re
import sys
from asyncio.subprocess import PIPE
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sglang_kit import SharedServer, ask, buckets_of, collect, layout_of, with_engine

from miles_core.errors import RunError
from miles_core.roles import Bucket, BucketLayout
from miles_core.testing.models import make_model, response_logprobs, trainer_context
from miles_sglang import sync
from miles_sglang.engine import SglangEngine
from miles_sglang.sync import Receiver, Sender
from miles_torch.checksum import checksum
from miles_torch.meeting import Meeting

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PROMPT = [7, 8, 9, 10, 11]


async def meet(engine: SglangEngine) -> tuple[Sender, Receiver]:
    sender = Sender(replace(trainer_context(Path(), 0), verify=True), 1)
    receiver = Receiver(engine.context, 1, sender.open(), layout_of(buckets_of(make_model())))
    await asyncio.gather(asyncio.to_thread(sender.connect), asyncio.to_thread(receiver.connect))
    return sender, receiver


async def publish(engine: SglangEngine, ends: tuple[Sender, Receiver], model: Any, version: int) -> None:
    sender, receiver = ends
    await engine.pause("in-place")
    send = partial(sender.send, iter(buckets_of(model)))
    await asyncio.gather(asyncio.to_thread(send), asyncio.to_thread(receiver.receive, engine.load))
    engine.set_version(version)
    await engine.resume()


async def part(ends: tuple[Sender, Receiver]) -> None:
    await asyncio.to_thread(ends[1].close)
    ends[0].close()


def test_weights_arrive_while_generation_goes_on_and_every_token_knows_its_version(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> Any:
        ends = await meet(engine)
        requests = [ask(f"runs {number}", [1 + number, 2], max_new_tokens=250) for number in range(4)]
        running = asyncio.create_task(collect(engine, requests))
        for version in (1, 2):
            await asyncio.sleep(0.15)
            await publish(engine, ends, make_model(seed=version), version)
        later = await collect(engine, [ask("later", PROMPT, max_new_tokens=16)])
        await part(ends)
        return await running, later["later"][0]

    runs, later = with_engine(server, use)
    expected = response_logprobs(make_model(seed=2), np.array(PROMPT, np.int32), later.tokens)
    np.testing.assert_allclose(later.logprobs, expected, atol=1e-4)
    assert set(later.versions.tolist()) == {2}
    for (completion,) in runs.values():
        versions = completion.versions.tolist()
        assert (len(versions), completion.status) == (250, "truncated")
        assert versions == sorted(versions)
        assert set(versions) == {0, 1, 2}
    assert not dist.is_initialized()


def test_after_the_end_of_a_meeting_there_can_be_another(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> Any:
        for version in (1, 2):
            ends = await meet(engine)
            await publish(engine, ends, make_model(seed=3), version)
            await part(ends)
        return await collect(engine, [ask("later", PROMPT, max_new_tokens=8)])

    (completion,) = with_engine(server, use)["later"]
    expected = response_logprobs(make_model(seed=3), np.array(PROMPT, np.int32), completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_who_waits_for_an_engine_that_does_not_come_is_let_go_and_meets_again(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> Any:
        sender = Sender(trainer_context(Path(), 0), 2)
        address = sender.open()
        receiver = Receiver(engine.context, 2, address, layout_of(buckets_of(make_model())))
        waiting = [asyncio.create_task(asyncio.to_thread(end.connect)) for end in (sender, receiver)]
        store: Any = Meeting(address, 60).store
        while not any(word.endswith("/1") for word in store.list_keys()):  # noqa: ASYNC110 — the server's rank's
            await asyncio.sleep(0.01)
        sender.give_up()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        await part((sender, receiver))
        place = urlsplit(address)
        joins = {"master_address": place.hostname, "master_port": place.port, "rank_offset": 1, "world_size": 2}
        with pytest.raises(RunError, match=f"nobody answers at {place.hostname}:{place.port}"):
            await asyncio.to_thread(sync.ask, server, "init_weights_update_group", backend="gloo", **joins)
        ends = await meet(engine)
        await publish(engine, ends, make_model(seed=6), 1)
        await part(ends)
        return errors, await collect(engine, [ask("later", PROMPT, max_new_tokens=8)])

    errors, answers = with_engine(server, use)
    assert [type(error) for error in errors] == [RunError, RunError]
    (completion,) = answers["later"]
    expected = response_logprobs(make_model(seed=6), np.array(PROMPT, np.int32), completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


GOES = """
import os, sys
from datetime import timedelta
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper
host, port = sys.argv[1].rsplit("/", 1)[1].split(":")
store = PrefixStore("miles", TCPStore(host, int(port), is_master=False, wait_for_workers=False))
minute = timedelta(minutes=1)
_new_process_group_helper(3, 2, [], Backend("gloo"), store, group_name="miles", timeout=minute)
os._exit(9)
"""
"""A member of a meeting of three who goes when all are there."""


def test_a_server_goes_on_when_another_member_ends_in_a_transfer_and_gets_the_weights_whole(
    server: SharedServer,
) -> None:
    async def use(engine: SglangEngine) -> Any:
        sender = Sender(trainer_context(Path(), 0), 2)
        receiver = Receiver(
            replace(engine.context, verify=False), 2, sender.open(), layout_of(buckets_of(make_model()))
        )
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", GOES, receiver._address, stdin=PIPE)
        await asyncio.gather(asyncio.to_thread(sender.connect), asyncio.to_thread(receiver.connect))
        await other.communicate()
        assert other.returncode == 9
        await engine.pause("in-place")

        async def leaving(end: Any, work: Any) -> bool:
            try:
                await asyncio.to_thread(work)
            except RunError:
                await asyncio.to_thread(end.close)
                return True
            return False

        send = partial(sender.send, iter(buckets_of(make_model(seed=4))))
        ended = await asyncio.gather(leaving(sender, send), leaving(receiver, partial(receiver.receive, engine.load)))
        assert any(ended)
        await part((sender, receiver))
        ends = await meet(engine)
        await publish(engine, ends, make_model(seed=5), 1)
        await part(ends)
        return await collect(engine, [ask("later", PROMPT, max_new_tokens=8)])

    (completion,) = with_engine(server, use)["later"]
    expected = response_logprobs(make_model(seed=5), np.array(PROMPT, np.int32), completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_what_the_server_does_not_load_is_said(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> None:
        sender, receiver = await meet(engine)
        bucket = BucketLayout(names=("model.norm.weight",), shapes=((5,),), dtype="float32")
        wrong = Bucket(names=bucket.names, shapes=bucket.shapes, flat=torch.zeros(5))
        receiver._layout = (bucket,)
        await engine.pause("drain")
        with pytest.raises(RunError, match=r"weight sync: engine 0: /update_weights_from_distributed: .*\(log: "):
            await asyncio.gather(
                asyncio.to_thread(sender.send, iter([wrong])), asyncio.to_thread(receiver.receive, engine.load)
            )
        await part((sender, receiver))

    with_engine(server, use)


def flip_a_bit_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the trainer sends."""
    send = dist.broadcast

    def changed(flat: torch.Tensor, **rest: Any) -> Any:
        flat = flat.clone()
        flat[100] ^= 1
        return send(flat, **rest)

    monkeypatch.setattr(dist, "broadcast", changed)


def exchange_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors of one shape."""

    def sent(flat: torch.Tensor, names: Any, *rest: Any) -> str:
        exchanged = {"q": "k", "k": "q"}
        return checksum(flat, [re.sub(r"(?<=\.)[qk](?=_norm)", lambda one: exchanged[one[0]], n) for n in names], *rest)

    monkeypatch.setattr(sync, "checksum", sent)


@pytest.mark.parametrize(
    ("fault", "first"), [(flip_a_bit_on_the_way, "model.embed_tokens"), (exchange_two_names, "model.layers.0")]
)
def test_weights_that_arrive_otherwise_than_they_were_sent_are_found_out(
    fault: Any, first: str, server: SharedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(engine: SglangEngine) -> None:
        ends = await meet(engine)
        sender, receiver = ends
        with monkeypatch.context() as patch:
            fault(patch)
            await engine.pause("in-place")
            sending = asyncio.create_task(asyncio.to_thread(sender.send, iter(buckets_of(make_model()))))
            with pytest.raises(RunError, match=rf"what arrived of {first}\.\S+ … at engine 0 is not what the"):
                await asyncio.to_thread(receiver.receive, engine.load)
        await part(ends)
        await asyncio.gather(sending, return_exceptions=True)  # nobody takes the rest
        await engine.resume()

    with_engine(server, use)
