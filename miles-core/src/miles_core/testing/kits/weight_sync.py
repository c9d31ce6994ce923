"""Rules of a weight sync: made-up buckets go from a sender to two receivers, each on a thread of its own; and what is
given up keeps nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from miles_core.errors import RunError
from miles_core.plugins import resolve
from miles_core.roles import Bucket, BucketLayout
from miles_core.specs import WeightSyncSpec
from miles_core.testing.models import engine_context, trainer_context
from miles_core.testing.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

ENGINES = 2
SHAPES = ((("a", (3, 5)), ("b.weight", (7,)), ("c", ())), (("d", (64, 33)),), (("e.bias", (1,)),))
"""(name, shape) of each tensor of each bucket."""
SOON_S = 20.0
"""How long it may take to hear that a meeting was given up."""


def carries_every_tensor_to_every_engine(subject: Subject[WeightSyncSpec]) -> Iterator[str]:
    """Names and bytes are the same on both sides, transfer after transfer, in float32 and in bfloat16."""
    _ = subject.example  # which may say that it cannot be tried
    for dtype in ("float32", "bfloat16"):
        sent, received = _transfers(subject, dtype, 2)
        for number, expected in enumerate(sent):
            for engine in range(ENGINES):
                got = received[engine][number]
                for name in sorted(expected.keys() | got.keys()):
                    if expected.get(name) != got.get(name):
                        yield f"{dtype}, transfer {number}, engine {engine}: {name} is not what was sent"


Sums = dict[str, str]


def _transfers(subject: Subject[WeightSyncSpec], dtype: str, count: int) -> tuple[list[Sums], list[list[Sums]]]:
    """Checksums by name of what was sent, and of what each engine received."""
    layout, (sender, receivers) = _layout(dtype), _members(subject, dtype)
    received: list[list[Sums]] = [[] for _ in receivers]
    sent = []
    with ThreadPoolExecutor(ENGINES + 1) as pool:
        _together(pool, [sender.connect, *(receiver.connect for receiver in receivers)])
        for number in range(count):
            buckets = [_bucket(part, number) for part in layout]
            sent.append({name: _sum(part) for bucket in buckets for name, part in bucket.tensors().items()})
            takes = [_taker(receiver, received[index]) for index, receiver in enumerate(receivers)]
            _together(pool, [partial(sender.send, iter(buckets)), *takes])
        _together(pool, [sender.close, *(receiver.close for receiver in receivers)])
    return sent, received


def _layout(dtype: str) -> list[BucketLayout]:
    return [
        BucketLayout(names=tuple(name for name, _ in part), shapes=tuple(shape for _, shape in part), dtype=dtype)
        for part in SHAPES
    ]


def _members(subject: Subject[WeightSyncSpec], dtype: str) -> tuple[Any, list[Any]]:
    """The sender, which is open, and the receivers."""
    sender = resolve(subject.spec.ref)(trainer_context(subject.folder, 0), ENGINES)
    address = sender.open()
    made = resolve(subject.spec.receiver)
    contexts = [engine_context(subject.folder, 0, folder=subject.folder, index=index) for index in range(ENGINES)]
    return sender, [made(context, ENGINES, address, _layout(dtype)) for context in contexts]


def keeps_nobody_who_waits_for_an_engine_that_has_failed(subject: Subject[WeightSyncSpec]) -> Iterator[str]:
    """Once the trainer has given a meeting up, it and the engines that wait there hear of it."""
    _ = subject.example
    sender, receivers = _members(subject, "float32")
    pool = ThreadPoolExecutor(2)
    waiting = {"trainer": pool.submit(sender.connect), "engine 0": pool.submit(receivers[0].connect)}  # 1 never comes
    sender.give_up()
    faults = {name: _end_of(wait) for name, wait in waiting.items()}
    yield from (f"{name} {fault}" for name, fault in faults.items() if fault is not None)
    if waiting["trainer"].done() and waiting["trainer"].exception() is None:
        yield "the trainer does not wait for engine 1"
    pool.shutdown(wait=False, cancel_futures=True)
    for end in (sender, receivers[0]):
        end.close()


def _end_of(wait: Future[None]) -> str | None:
    """What is wrong with how a wait ends. An engine need not wait for others."""
    try:
        wait.result(SOON_S)
    except RunError:
        return None
    except TimeoutError:
        return f"still waits {SOON_S:g} s after the meeting was given up"
    except Exception as error:
        return f"raises {type(error).__name__} instead of RunError"
    return None


def _together(pool: ThreadPoolExecutor, calls: Sequence[Callable[[], Any]]) -> None:
    for future in [pool.submit(call) for call in calls]:
        future.result()


def _taker(receiver: Any, received: list[Sums]) -> Callable[[], None]:
    def take() -> None:
        sums: Sums = {}

        def load(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
            sums.update({name: _sum(tensor) for name, tensor in zip(names, tensors, strict=True)})

        receiver.receive(load)
        received.append(sums)

    return take


def _bucket(layout: BucketLayout, number: int) -> Bucket:
    import torch

    size = sum(int(np.prod(shape)) for shape in layout.shapes)
    generator = torch.Generator().manual_seed(size + 1000 * number)
    flat = torch.randn(size, generator=generator).to(getattr(torch, layout.dtype))
    return Bucket(names=layout.names, shapes=layout.shapes, flat=flat)


def _sum(tensor: Tensor) -> str:
    """Of shape and bytes."""
    import torch

    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(raw).hexdigest()}"


RULES = (carries_every_tensor_to_every_engine, keeps_nobody_who_waits_for_an_engine_that_has_failed)
