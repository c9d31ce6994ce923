"""The weight sync between real processes over loopback."""

from __future__ import annotations

import math
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sync_member import LAYOUT, Member, checksum

from miles_core.errors import RunError
from miles_core.roles import Bucket, TrainerContext
from miles_core.testing.models import engine_context
from miles_torch.meeting import Meeting
from miles_torch.sync import TorchReceiver, TorchSender, _Channel


def make_sender(engines: int, timeout_s: float = 20.0) -> TorchSender:
    context = TrainerContext(
        model=Path(),
        rank=0,
        world_size=1,
        address="tcp://127.0.0.1:1",
        gpus=0,
        threads=1,
        seed=0,
        reference=False,
        timeout_s=timeout_s,
    )
    return TorchSender(context, engines)


def make_buckets(seed: int) -> list[Bucket]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Bucket(
            names=part.names,
            shapes=part.shapes,
            flat=torch.randn(sum(map(math.prod, part.shapes)), generator=generator).to(getattr(torch, part.dtype)),
        )
        for part in LAYOUT
    ]


def checksums(buckets: list[Bucket]) -> dict[str, float]:
    found: dict[str, float] = {}
    for bucket in buckets:
        found |= {name: checksum(tensor) for name, tensor in bucket.tensors().items()}
    return found


def connect(sender: TorchSender, members: list[Member]) -> None:
    address = sender.open()
    for member in members:
        member.tell(f"connect {address}")
    sender.connect()
    assert [member.answer() for member in members] == [None] * len(members)


def transfer(sender: TorchSender, members: list[Member], seed: int) -> None:
    buckets = make_buckets(seed)
    for member in members:
        member.tell("receive")
    sender.send(iter(buckets))
    assert [member.answer() for member in members] == [checksums(buckets)] * len(members)


def test_all_engines_get_every_byte_and_a_replaced_engine_joins_again():
    sender = make_sender(2)
    first, second = Member(0, 2), Member(1, 2)
    connect(sender, [first, second])
    transfer(sender, [first, second], 1)
    transfer(sender, [first, second], 2)
    assert not dist.is_initialized()
    second.tell("die")
    second.end()
    first.tell("close")
    assert first.answer() is None
    sender.close()
    second = Member(1, 2)
    connect(sender, [first, second])
    transfer(sender, [first, second], 3)
    sender.close()
    first.end()
    second.end()


def test_engines_that_do_not_connect_are_named_and_whoever_waits_for_them_hears_that_it_was_given_up():
    sender = make_sender(3, timeout_s=1.5)
    address = sender.open()
    member = Member(1, 3)
    member.tell(f"connect {address}")
    assert Meeting(address, 60).missing(["connect/2"]) == []
    with pytest.raises(
        RunError, match=r"engine 0, engine 2 did not come to 'connect' within 1\.5 s; the trainer waited"
    ):
        sender.connect()
    sender.give_up()
    assert member.answer() == "RunError: weight sync: the meeting was given up."
    sender.close()
    member.end()


def test_an_engine_that_dies_before_a_transfer_is_named():
    sender = make_sender(1)
    member = Member(0, 1)
    connect(sender, [member])
    member.tell("die")
    member.end()
    sender._channel.meeting.timeout = timedelta(seconds=0.1)
    with pytest.raises(RunError, match="engine 0 did not come to 'transfer 1'"):
        sender.send(iter(make_buckets(0)))
    sender.close()


def test_a_trainer_that_does_not_answer_is_named(monkeypatch):
    from miles_core.roles import EngineContext

    monkeypatch.setattr("miles_torch.sync.CONNECT_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = EngineContext(
        model=Path(), index=0, gpus=0, threads=1, dtype="float32", max_tokens=8, seed=0, folder=Path()
    )
    with pytest.raises(RunError, match=f"the trainer does not answer at tcp://127.0.0.1:{port}"):
        TorchReceiver(context, 1, f"tcp://127.0.0.1:{port}", LAYOUT).connect()


def test_the_meeting_point_listens_on_the_trainers_address_only():
    sender = make_sender(1)
    port = int(sender.open().rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
    with pytest.raises(OSError):  # noqa: PT011 - refused or unreachable, by platform
        socket.create_connection(("127.0.0.2", port), timeout=2)
    sender.close()


def test_bytes_that_arrive_otherwise_than_they_were_sent_are_found_out(monkeypatch):
    broadcast = _Channel.broadcast

    def spoiling(channel, flat):
        broadcast(channel, flat)
        if channel.rank == 1 and channel.transfers == 2 and flat.dtype == torch.bfloat16:
            flat.view(torch.uint8)[3] ^= 1

    monkeypatch.setattr(_Channel, "broadcast", spoiling)
    sender = make_sender(1, timeout_s=2)
    sender._context = replace(sender._context, verify=True)
    context = replace(engine_context(Path(), 0, folder=Path()), verify=True)
    receiver = TorchReceiver(context, 1, sender.open(), LAYOUT)
    received = []
    with ThreadPoolExecutor(1) as pool:
        connected = pool.submit(receiver.connect)
        sender.connect()
        connected.result()
        for faults in (False, True):
            sent = pool.submit(sender.send, iter(make_buckets(int(faults))))
            if faults:
                with pytest.raises(RunError, match="what arrived of c … at engine 0 is not what the trainer has sent"):
                    receiver.receive(lambda names, tensors: received.extend(names))
                with pytest.raises(RunError, match="weight sync"):  # which wait ends first is open
                    sent.result()
            else:
                receiver.receive(lambda names, tensors: received.extend(names))
                sent.result()
    assert received == ["a", "b", "c", "d", "a", "b"]
    receiver.close()
    sender.close()
