"""The weight sync of colocated trainers and servers: a server reads a bucket where the trainer has it.

Each trainer rank serves the server's rank that has the same GPU. What it hands over of a bucket is a handle of some
hundred bytes: CUDA's, for memory of another process, or without a GPU a file that is only memory. The server copies
from there into its weights (`/update_weights_from_tensor`), on the GPU itself.

A store of trainer rank 0 carries the handles, and the word that a bucket is loaded; until then the trainer keeps it.
One more bucket is made ready meanwhile, so a transfer takes two buckets of memory on each GPU.

The server unpickles handles with SGLang's own list of what may be in them. So they are made of what PyTorch has, and
the trainer does not import SGLang.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import math
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch.cuda import ipc_collect
from torch.multiprocessing.reductions import reduce_tensor

from miles_core.errors import RunError
from miles_core.roles import Bucket, BucketLayout, EngineContext, TrainerContext
from miles_sglang.server import Server, beside
from miles_sglang.sync import PATIENCE_S, ask
from miles_torch.checksum import checksum
from miles_torch.meeting import Meeting, open_meeting

if TYPE_CHECKING:
    from torch import Tensor

_LOST = "lost"
"""Instead of the word that a bucket is loaded: it will not be."""
_DEVICE = 6
"""The place of the device among the arguments with which PyTorch opens CUDA memory of another process."""


# ---- Handles ------------------------------------------------------------------------------------------------------


class _Call:
    """What is a call of a function once it is unpickled."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self._call = function, tuple(arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


class Handle(Protocol):
    """Memory that another process may read until it is closed. opening: gives the tensor there, once unpickled."""

    opening: _Call

    def close(self) -> None: ...


class GpuHandle:
    """A tensor of bytes where it is, on a GPU."""

    def __init__(self, flat: Tensor) -> None:
        torch.cuda.current_stream(flat.device).synchronize()
        function, arguments = reduce_tensor(flat)  # type: ignore[no-untyped-call]
        # By its UUID, as SGLang does: processes may count their GPUs differently.
        uuid = str(torch.cuda.get_device_properties(flat.device).uuid)
        self.opening = _Call(function, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :]))
        self._flat: Tensor | None = flat

    def close(self) -> None:
        """Lets the memory go."""
        self._flat = None


class HostHandle:
    """A copy of a tensor of bytes in a file that is only memory, and ends with its last user."""

    def __init__(self, flat: Tensor) -> None:
        self._file = os.memfd_create("miles-weights")
        size = flat.numel()
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            self.close()
            raise RunError(f"weight sync: no memory for a bucket of {size} bytes: {error}") from error
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        opened = functools.partial(torch.from_file, dtype=torch.uint8)
        opened(path, True, size).copy_(flat)
        self.opening = _Call(opened, (path, True, size))

    def close(self) -> None:
        """Lets the memory go."""
        os.close(self._file)


def parcel(bucket: Bucket, dtype: torch.dtype, handle: Handle) -> bytes:
    """A bucket as SGLang reads it: the handle, and where each tensor lies, in bytes."""
    metadata, place = [], 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        size = math.prod(shape) * dtype.itemsize
        metadata.append(
            SimpleNamespace(name=name, shape=shape, dtype=dtype, start_idx=place, end_idx=place + size, numel=size)
        )
        place += size
    return pickle.dumps({"flattened_tensor": handle.opening, "metadata": metadata})


# ---- The two sides ------------------------------------------------------------------------------------------------


class Sender:
    """The trainer's side. See `miles_core.roles.WeightSender`; every rank hands over to one rank of a server."""

    def __init__(self, context: TrainerContext, engines: int) -> None:
        self._context, self._engines = context, engines
        self._store: Any = None
        self._address = ""
        self._meeting: Meeting | None = None
        self._transfers = 0
        self._dtypes: dict[int, torch.dtype] = {}

    def open(self) -> str:
        """Listens at a free port, on the address at which the other trainer ranks know this one."""
        self._store, self._address = open_meeting(self._context)
        return self._address

    def connect(self) -> None:
        """Waits until the engine of this rank is there."""
        context = self._context
        place = [self._address]
        if context.world_size > 1:
            dist.broadcast_object_list(place, src=0)
        self._meeting = Meeting(place[0], context.timeout_s)
        self._wait(f"engine {context.rank * self._engines // context.world_size}")

    def send(self, buckets: Iterator[Bucket]) -> None:
        """Hands over all buckets, and returns when this rank's server has loaded them. If that fails, this rank still
        does its part for the servers of others."""
        self._transfers += 1
        lost: RunError | None = None
        with contextlib.ExitStack() as held:
            for number, bucket in enumerate(buckets):
                flat = self._whole(bucket, number)
                if lost is not None:
                    continue
                try:
                    handle = self._hand_over(bucket, flat, number)
                    del bucket, flat
                    with held.pop_all():  # the one before, which has been read meanwhile
                        held.callback(handle.close)
                        if number:
                            self._loaded(number - 1)
                except RunError as error:
                    lost = error
            if lost is None:
                self._loaded(number)
        if self._context.gpus:
            ipc_collect()  # type: ignore[no-untyped-call]
        if lost is not None:
            raise lost

    def _hand_over(self, bucket: Bucket, flat: Tensor, number: int) -> Handle:
        raw = flat.view(torch.uint8)
        handle: Handle = GpuHandle(raw) if raw.is_cuda else HostHandle(raw)
        said = checksum(raw, bucket.names, bucket.shapes, flat.dtype) if self._context.verify else "-"
        payload = base64.b64encode(parcel(bucket, flat.dtype, handle)).decode()
        try:
            self._words.say(self._key("handle", number), f"{said} {payload}")
        except RunError:
            handle.close()
            raise
        return handle

    def _whole(self, bucket: Bucket, number: int) -> Tensor:
        """A bucket's tensors end to end, which rank 0 has, on every rank."""
        flat = bucket.flat.detach().contiguous()
        if self._context.world_size == 1:
            return flat
        if number not in self._dtypes:  # by the ranks' own group, because a meeting may be given up on the way
            known = [flat.dtype]
            dist.broadcast_object_list(known, src=0)
            (self._dtypes[number],) = known
        if self._context.rank != 0:
            size = sum(math.prod(shape) for shape in bucket.shapes)
            flat = torch.empty(size, dtype=self._dtypes[number], device="cuda" if self._context.gpus else "cpu")
        dist.broadcast(flat, src=0)
        return flat

    @property
    def _words(self) -> Meeting:
        assert self._meeting is not None, "connect first"
        return self._meeting

    def _loaded(self, number: int) -> None:
        """Waits until the bucket is loaded."""
        key = self._key("loaded", number)
        self._wait(key)
        if self._words.hear(key) == _LOST:
            raise RunError(f"weight sync: the server of the trainer's rank {self._context.rank} has not loaded all")
        self._words.forget(key)

    def _key(self, word: str, number: int) -> str:
        return f"{word} {self._transfers}/{number}/{self._context.rank}"

    def _wait(self, key: str) -> None:
        if self._words.missing([key]):
            raise RunError(
                f"weight sync: the trainer's rank {self._context.rank} waited for {key!r} of its server for "
                f"{self._context.timeout_s:g} s"
            )

    def give_up(self) -> None:
        """Lets the store go, and with it whoever waits."""
        self._store = None

    def close(self) -> None:
        """Ends the meeting; `open` starts a new one."""
        self._meeting = self._store = None


class Receiver:
    """The side of one server. See `miles_core.roles.WeightReceiver`; it is built in the process of the engine that has
    started the server, and `load` is not used, because the server itself reads."""

    def __init__(self, context: EngineContext, engines: int, address: str, layout: Sequence[BucketLayout]) -> None:
        self._server: Server = beside(context)
        self._verify, self._address, self._layout = context.verify, address, tuple(layout)
        self._index, self._transfers = context.index, 0
        first = context.index * self._server.ranks
        self._ranks = range(first, first + self._server.ranks)
        self._meeting: Meeting | None = None

    def connect(self) -> None:
        """Tells the trainer that this engine is there."""
        self._meeting = Meeting(self._address, PATIENCE_S)
        self._meeting.say(f"engine {self._index}")

    def receive(self, load: Callable[[Sequence[str], Sequence[Tensor]], None]) -> None:
        """Has the server load all buckets of one transfer. It hears of one more while it loads one."""
        assert self._meeting is not None, "connect first"
        self._transfers += 1
        try:
            self._receive(self._meeting)
        except RunError:
            with contextlib.suppress(RunError):  # the trainer need not wait for what will not come
                for key in (key for number in range(len(self._layout)) for key in self._keys(number)):
                    self._meeting.say(f"loaded {key}", _LOST)
            raise

    def _receive(self, meeting: Meeting) -> None:
        asked: deque[tuple[int, str, Future[str]]] = deque()
        with ThreadPoolExecutor(2) as pool:
            for number in range(len(self._layout)):
                said = [meeting.hear(f"handle {key}").split() for key in self._keys(number)]
                asked.append((number, said[0][0], pool.submit(self._load, [payload for _, payload in said])))
                if number:
                    self._loaded(meeting, *asked.popleft())
            self._loaded(meeting, *asked.popleft())

    def _keys(self, number: int) -> list[str]:
        return [f"{self._transfers}/{number}/{rank}" for rank in self._ranks]

    def _load(self, payloads: Sequence[str]) -> str:
        return ask(
            self._server,
            "update_weights_from_tensor",
            serialized_named_tensors=payloads,
            load_format="flattened_bucket",
            flush_cache=False,  # each version has its own part of the cache, see `tagging`
        )

    def _loaded(self, meeting: Meeting, number: int, sent: str, answer: Future[str]) -> None:
        """Tells the trainer that a bucket is loaded, when it is."""
        if not answer.result().endswith(f"={sent}") and self._verify:
            raise RunError(
                f"weight sync: what {self._server.name} has loaded of {self._layout[number].names[0]} … is not what "
                f"the trainer has sent (log: {self._server.log})"
            )
        for key in self._keys(number):
            meeting.forget(f"handle {key}")
            meeting.say(f"loaded {key}")

    def close(self) -> None:
        """Leaves the meeting."""
        self._meeting = None
