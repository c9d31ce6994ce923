"""The weight sync torch -> torch: flat buckets, broadcast over a process group of its own.

Trainer rank 0 is rank 0 of the group, engine i is rank i + 1. The group is built directly on a TCP store, so no
default process group is touched on either side, and it can be built again when an engine was replaced. The store
also carries a few words around each transfer ("engine 1 is ready for transfer 7"), so that whoever waits in vain can
name the missing side instead of reporting a broken socket.

gloo carries the bytes through host memory; if the trainer and all engines have GPUs of their own, NCCL does.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from miles_core.errors import RunError
from miles_core.roles import Bucket, BucketLayout, EngineContext, TrainerContext
from miles_torch.checksum import checksum
from miles_torch.meeting import Meeting, open_meeting

CONNECT_TIMEOUT_S = 120.0
"""For engines, whose context has no time limit of its own; the trainer's comes from the run."""


def _own_host(peer: str, port: int) -> str:
    """The address of this machine on the way to `peer`: loopback for a peer on this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, port))  # datagrams: nothing is sent
        host: str = probe.getsockname()[0]
        return host


class _Channel:
    """One member's end: the meeting for words, the group for bytes. host: this machine, for the others."""

    def __init__(self, meeting: Meeting, rank: int, size: int, host: str) -> None:
        self.meeting, self.rank, self.size, self.host = meeting, rank, size, host
        self.transfers = 0
        self.cuda = False
        self.group: Any = None

    def say(self, word: str) -> None:
        self.meeting.say(f"{word}/{self.rank}")

    def hear(self, word: str, ranks: Sequence[int]) -> None:
        """Waits until all of `ranks` have said `word`; the error names those that have not."""
        words = {f"{word}/{rank}": _member(rank) for rank in ranks}
        if missing := self.meeting.missing([*words]):
            raise RunError(
                f"weight sync: {', '.join(words[one] for one in missing)} did not come to '{word}' within "
                f"{self.meeting.timeout.total_seconds():g} s; {_member(self.rank)} waited."
            )

    def join(self, gpus: int) -> None:
        """Meets all members and builds the group."""
        self.meeting.say(f"gpu/{self.rank}", str(int(gpus > 0)))
        self.say("connect")
        self.hear("connect", range(self.size))
        self.cuda = all(int(self.meeting.hear(f"gpu/{rank}")) for rank in range(self.size))
        try:
            self.group = self._group()
        except RuntimeError as error:
            raise RunError(f"weight sync: {_member(self.rank)} has not reached all others: {error}") from error

    def _group(self) -> Any:
        store = PrefixStore("group", self.meeting.store)
        if self.cuda:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self.meeting.timeout
            return dist.ProcessGroupNCCL(store, self.rank, self.size, options)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=self.host)]
        options._timeout = self.meeting.timeout
        return ProcessGroupGloo(store, self.rank, self.size, options)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")

    def meet(self) -> None:
        """The start of a transfer: everyone is there."""
        assert self.group is not None, "connect first"
        self.transfers += 1
        self.say(f"transfer {self.transfers}")
        self.hear(f"transfer {self.transfers}", range(self.size))

    def broadcast(self, flat: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            self.group.broadcast([flat], options).wait()
        except RuntimeError as error:
            raise RunError(
                f"weight sync: transfer {self.transfers} broke off at {_member(self.rank)}: {error}"
            ) from error

    def close(self) -> None:
        if self.group is not None:
            self.group.shutdown()
        self.group = None


def _member(rank: int) -> str:
    return "the trainer" if rank == 0 else f"engine {rank - 1}"


def _checksum_key(channel: _Channel, number: int) -> str:
    return f"checksum {channel.transfers}/{number}"


class TorchSender:
    """The trainer's side. See `miles_core.roles.WeightSender`; only rank 0 does anything."""

    def __init__(self, context: TrainerContext, engines: int) -> None:
        self._context, self._engines = context, engines
        self._store: Any = None
        self._channel: _Channel | None = None

    def open(self) -> str:
        """Listens on the address at which the other trainer ranks know this one, at a free port."""
        self._store, address = open_meeting(self._context)
        meeting = Meeting(address, self._context.timeout_s)
        self._channel = _Channel(meeting, 0, self._engines + 1, meeting.host)
        return address

    def connect(self) -> None:
        """Waits until all engines are there; the error names those that are not."""
        if self._context.rank == 0:
            assert self._channel is not None, "open first"
            # NCCL has no ranks that share a GPU, as those of colocated trainers and engines would.
            self._channel.join(self._context.gpus if self._context.layout == "disaggregated" else 0)

    def send(self, buckets: Iterator[Bucket]) -> None:
        """Broadcasts all buckets and returns when every engine has loaded them."""
        if self._context.rank != 0:
            for _ in buckets:
                pass
            return
        channel = self._channel
        assert channel is not None, "open first"
        channel.meet()
        for number, bucket in enumerate(buckets):
            if self._context.verify:
                said = checksum(bucket.flat, bucket.names, bucket.shapes, bucket.flat.dtype)
                channel.meeting.say(_checksum_key(channel, number), said)
            channel.broadcast(bucket.flat.to(channel.device))
        channel.hear(f"loaded {channel.transfers}", range(1, channel.size))

    def give_up(self) -> None:
        """Lets the store go, and with it whoever waits."""
        self._store = None

    def close(self) -> None:
        """Ends the meeting; `open` starts a new one."""
        if self._channel is not None:
            self._channel.close()
        self._channel = self._store = None


class TorchReceiver:
    """An engine's side. See `miles_core.roles.WeightReceiver`."""

    def __init__(self, context: EngineContext, engines: int, address: str, layout: Sequence[BucketLayout]) -> None:
        self._context, self._engines, self._address, self._layout = context, engines, address, tuple(layout)
        self._channel: _Channel | None = None
        self._buffers: dict[str, Tensor] = {}

    def connect(self) -> None:
        """Goes to the trainer's meeting point and waits for the other members."""
        meeting = Meeting(self._address, CONNECT_TIMEOUT_S)
        host = _own_host(meeting.host, meeting.port)
        self._channel = _Channel(meeting, self._context.place + 1, self._engines + 1, host)
        self._channel.join(self._context.gpus)

    def receive(self, load: Callable[[Sequence[str], Sequence[Tensor]], None]) -> None:
        """Receives all buckets of one transfer. The tensors handed to `load` are valid only during the call."""
        channel = self._channel
        assert channel is not None, "connect first"
        channel.meet()
        for number, bucket in enumerate(self._layout):
            flat = self._buffer(bucket.dtype, sum(math.prod(shape) for shape in bucket.shapes))
            channel.broadcast(flat)
            self._compare(channel, number, flat)
            tensors = Bucket(names=bucket.names, shapes=bucket.shapes, flat=flat).tensors()
            load(bucket.names, list(tensors.values()))
        channel.say(f"loaded {channel.transfers}")

    def _compare(self, channel: _Channel, number: int, flat: Tensor) -> None:
        bucket = self._layout[number]
        if not self._context.verify or (
            channel.meeting.hear(_checksum_key(channel, number))
            == checksum(flat, bucket.names, bucket.shapes, flat.dtype)
        ):
            return
        raise RunError(
            f"weight sync: what arrived of {bucket.names[0]} … at {_member(channel.rank)} is not what the trainer has "
            f"sent."
        )

    def _buffer(self, dtype: str, size: int) -> Tensor:
        """One buffer a dtype, as large as the largest bucket, used again and again."""
        assert self._channel is not None
        if dtype not in self._buffers:
            largest = max(
                sum(math.prod(shape) for shape in bucket.shapes) for bucket in self._layout if bucket.dtype == dtype
            )
            self._buffers[dtype] = torch.empty(largest, dtype=getattr(torch, dtype), device=self._channel.device)
        return self._buffers[dtype][:size]

    def close(self) -> None:
        """Leaves the meeting."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        self._buffers.clear()
