"""The weight syncs that lead to the engine `sglang`: flat buckets, broadcast from the trainer into the servers.

Trainer rank 0 is rank 0 of a process group of its own; behind it come the tensor-parallel ranks of each server, which
SGLang makes join (`/init_weights_update_group`) and take each bucket as one broadcast
(`/update_weights_from_distributed`). The bytes go straight from the trainer's process to the servers'; the engines'
processes only say what comes next. gloo carries them from a trainer without GPUs, NCCL from one with GPUs.
"""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

from miles_core.errors import RunError
from miles_core.roles import Bucket, BucketLayout, EngineContext, TrainerContext
from miles_sglang.server import Server, beside
from miles_torch.checksum import checksum
from miles_torch.meeting import Meeting, open_meeting

if TYPE_CHECKING:
    from torch import Tensor

GROUP: Any = "miles"  # a str; what PyTorch calls its type has changed
PATIENCE_S = 300.0
"""How long an engine waits for a word of the trainer's; its context has no time limit of its own."""


class Sender:
    """The trainer's side. See `miles_core.roles.WeightSender`; only rank 0 sends."""

    def __init__(self, context: TrainerContext, engines: int) -> None:
        self._context, self._engines = context, engines
        self._store: Any = None
        self._meeting: Meeting | None = None
        self._group: Any = None
        self._transfers = 0

    def open(self) -> str:
        """Listens at a free port, on the address at which the other trainer ranks know this one."""
        self._store, address = open_meeting(self._context)
        self._meeting = Meeting(address, self._context.timeout_s)
        return address.replace("tcp", "nccl" if self._context.gpus else "gloo", 1)

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._context.timeout_s)

    def connect(self) -> None:
        """Waits until the ranks of all servers are there."""
        if self._context.rank != 0:
            return
        assert self._meeting is not None, "open first"
        # The first receiver says how many ranks a server has: the same of all, since all have the same options.
        ranks = int(self._meeting.hear("ranks")) * self._engines + 1
        backend = Backend("nccl" if self._context.gpus else "gloo")
        store = PrefixStore(GROUP, self._meeting.store)
        try:
            self._group, _ = _new_process_group_helper(
                ranks,
                0,
                [],
                backend,
                store,
                group_name=GROUP,
                timeout=self._timeout,
            )
        except RuntimeError as error:
            raise RunError(f"weight sync: not all servers have joined: {error}") from error
        _world.pg_group_ranks[self._group] = {rank: rank for rank in range(ranks)}

    def send(self, buckets: Iterator[Bucket]) -> None:
        """Broadcasts all buckets; a receiver returns when its server has loaded them."""
        self._transfers += 1
        for number, bucket in enumerate(buckets):
            if self._context.rank != 0:
                continue
            assert self._meeting is not None, "open first"
            assert self._group is not None, "connect first"
            flat = bucket.flat.contiguous().view(torch.uint8)
            if self._context.verify:
                said = checksum(flat, bucket.names, bucket.shapes, bucket.flat.dtype)
                self._meeting.say(f"checksum {self._transfers}/{number}", said)
            try:
                dist.broadcast(flat.cuda() if self._context.gpus else flat.cpu(), src=0, group=self._group)
            except RuntimeError as error:
                raise RunError(f"weight sync: the transfer broke off at the trainer: {error}") from error

    def give_up(self) -> None:
        """Lets the store go, and with it whoever waits."""
        self._store = None

    def close(self) -> None:
        """Ends the meeting; `open` starts a new one."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = self._meeting = self._store = None


class Receiver:
    """The side of one server. See `miles_core.roles.WeightReceiver`; it is built in the process of the engine that has
    started the server, and `load` is not used, because the server itself receives."""

    def __init__(self, context: EngineContext, engines: int, address: str, layout: Sequence[BucketLayout]) -> None:
        self._server: Server = beside(context)
        self._verify, self._transfers = context.verify, 0
        self._meeting: Meeting | None = None
        self._place, self._engines, self._layout = context.place, engines, tuple(layout)
        self._address = address

    def connect(self) -> None:
        """Has the server's ranks join the trainer."""
        self._meeting = Meeting(self._address, PATIENCE_S)
        self._meeting.say("ranks", str(self._server.ranks))
        place = urlsplit(self._address)
        ask(
            self._server,
            "init_weights_update_group",
            master_address=place.hostname,
            master_port=place.port,
            rank_offset=1 + self._place * self._server.ranks,
            world_size=1 + self._engines * self._server.ranks,
            group_name=GROUP,
            backend=place.scheme,
        )

    def receive(self, load: Callable[[Sequence[str], Sequence[Tensor]], None]) -> None:
        """Has the server receive and load all buckets of one transfer."""
        self._transfers += 1
        for number, bucket in enumerate(self._layout):
            answer = ask(
                self._server,
                "update_weights_from_distributed",
                names=bucket.names,
                dtypes=[bucket.dtype] * len(bucket.names),
                shapes=bucket.shapes,
                group_name=GROUP,
                load_format="flattened_bucket",
                flush_cache=False,  # each version has its own part of the cache, see `tagging`
            )
            if self._verify and not answer.endswith(f"={self._sent(number)}"):
                raise RunError(
                    f"weight sync: what arrived of {bucket.names[0]} … at {self._server.name} is not what the "
                    f"trainer has sent (log: {self._server.log})"
                )

    def _sent(self, number: int) -> str:
        """The checksum of a bucket of this transfer, as the trainer says it."""
        assert self._meeting is not None, "connect first"
        return self._meeting.hear(f"checksum {self._transfers}/{number}")

    def close(self) -> None:
        """Leaves the meeting, unless the server has ended before."""
        with contextlib.suppress(RunError):
            ask(self._server, "destroy_weights_update_group", group_name=GROUP)


def ask(server: Server, path: str, **body: Any) -> str:
    """Waits for a server, and gives its message. `RunError` unless it has done what it was asked."""
    request = urllib.request.Request(  # noqa: S310 — our own server, by HTTP
        f"{server.url}/{path}", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as response:  # noqa: S310
            text = response.read()
    except HTTPError as error:
        text = error.read()
    except (OSError, HTTPException) as error:
        raise server.lost(path, error) from error
    try:
        answer = json.loads(text)
    except ValueError:  # words
        answer = {"message": text.decode(errors="replace")}
    if not answer.get("success"):
        raise RunError(f"weight sync: {server.name}: /{path}: {answer.get('message', answer)} (log: {server.log})")
    return str(answer.get("message"))
