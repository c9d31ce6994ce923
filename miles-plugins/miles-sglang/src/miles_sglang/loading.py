"""In the server's processes: how they meet the trainer, and how a bucket of weights gets into the model.

SGLang's loaders go through all parameters of the model for every bucket, and copy tensor by tensor. Where they copy to
depends on names and shapes alone. So for the first bucket of a kind they work, and Miles watches; the next ones are
copied as they did it, all tensors in one go. A loader that does more than to copy (that computes something of the
weights, say) works every time.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VERIFY = "MILES_SGLANG_VERIFY"
"""The environment variable that makes the server say the checksum of every bucket that has arrived."""

PATIENCE_S = 30.0
"""How long the trainer's machine may take to answer."""

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"


def register() -> None:
    """Has SGLang call the functions of this module instead of its own, once it loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for method, own in (
        ("_update_weights_from_flattened_bucket", _from_handle),
        ("_update_bucketed_weights_from_distributed", _from_broadcast),
        ("init_weights_update_group", _meet),
    ):
        HookRegistry.register(f"{_UPDATER}.{method}", own, HookType.AROUND)


def _meet(
    original: Callable[..., tuple[bool, str]], updater: Any, host: str, port: int, *rest: Any
) -> tuple[bool, str]:
    """Joins the trainer. At a meeting that was given up meanwhile PyTorch would knock for half an hour."""
    try:
        with socket.create_connection((host, port), PATIENCE_S):
            pass
    except OSError as error:
        return False, f"nobody answers at {host}:{port}: {error}"
    return original(updater, host, port, *rest)


def _from_handle(original: object, updater: Any, flattened_tensor_bucket_dict: Mapping[str, Any]) -> tuple[bool, str]:
    """A bucket in the memory of another process."""
    parts = [
        Part(part.name, tuple(part.shape), part.dtype, part.start_idx)
        for part in flattened_tensor_bucket_dict["metadata"]
    ]
    return _load(updater, flattened_tensor_bucket_dict["flattened_tensor"], parts)


def _from_broadcast(
    original: object,
    updater: Any,
    names: Sequence[str],
    dtypes: Sequence[str],
    shapes: Sequence[Sequence[int]],
    group_name: str,
) -> tuple[bool, str]:
    """A bucket that the trainer broadcasts."""
    import torch
    import torch.distributed as dist

    parts, place = [], 0
    for name, dtype, shape in zip(names, (getattr(torch, dtype) for dtype in dtypes), shapes, strict=True):
        parts.append(Part(name, tuple(shape), dtype, place))
        place += math.prod(shape) * dtype.itemsize
    flat = torch.empty(place, dtype=torch.uint8, device=updater.device)
    try:
        dist.broadcast(flat, src=0, group=updater._model_update_group[group_name])
    except RuntimeError as error:  # another member has gone; the server goes on without these weights
        return False, f"the transfer broke off: {error}"
    return _load(updater, flat, parts)


def _load(updater: Any, flat: Tensor, parts: Sequence[Part]) -> tuple[bool, str]:
    """What SGLang answers: whether it is loaded, and a message that ends with the checksum if it is asked for."""
    try:
        load(updater.get_model(), flat, parts)
    except Exception as error:  # it becomes the server's answer
        return False, f"{type(error).__name__}: {error}"
    return True, f"checksum={_checksum(flat, parts)}" if os.environ.get(VERIFY) else ""


def _checksum(flat: Tensor, parts: Sequence[Part]) -> str:
    """Of what has arrived."""
    from miles_torch.checksum import checksum

    return checksum(flat, [part.name for part in parts], [part.shape for part in parts], parts[0].dtype)


# ---- Routes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A tensor in a bucket. start: where it begins, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """It itself, of a bucket as a tensor of bytes [bytes]."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return flat[self.start : self.start + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Copy:
    """One that a loader has made. part: the number of the tensor that it is of; size, stride, offset: what of that one,
    in elements."""

    target: Tensor
    part: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def source(self, tensors: Sequence[Tensor]) -> Tensor:
        """What is copied."""
        tensor = tensors[self.part]
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class _Route:
    """What a loader does with a bucket. copies: all of it, None if it does more than to copy; homes: where the model's
    memory was then."""

    copies: Sequence[_Copy] | None
    homes: Sequence[tuple[Tensor, int]]

    @property
    def holds(self) -> bool:
        """Whether the model's memory is where it was."""
        return all(tensor.data_ptr() == place for tensor, place in self.homes)


_routes: dict[tuple[int, tuple[Part, ...]], _Route] = {}


def load(model: Any, flat: Tensor, parts: Sequence[Part]) -> None:
    """Loads a bucket, a tensor of bytes [bytes], into a model with SGLang's `load_weights`."""
    import torch

    tensors = [part.of(flat) for part in parts]
    named = [(part.name, tensor) for part, tensor in zip(parts, tensors, strict=True)]
    key = id(model), tuple(parts)
    route = _routes.get(key)
    if route is None or not route.holds:
        copies = _watched(lambda: model.load_weights(named), tensors)
        homes = [(tensor, tensor.data_ptr()) for tensor in (*model.parameters(), *model.buffers())]
        _routes[key] = _Route(copies, homes)
    elif route.copies is None:
        model.load_weights(named)
    else:
        with torch.no_grad():
            torch._foreach_copy_(
                [copy.target for copy in route.copies], [copy.source(tensors) for copy in route.copies]
            )


def _watched(work: Callable[[], object], tensors: Sequence[Tensor]) -> list[_Copy] | None:
    """Does the work, and gives the copies of these tensors that it made; None if it did anything else."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[_Copy | None] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not operation.is_view:
                seen.append(_copy_of(operation, args, tensors))
            return operation(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        work()
    copies = [copy for copy in seen if copy is not None]
    # What a kernel of its own has done to what was copied is not seen as an operation.
    kept = all(copy.target.equal(copy.source(tensors).to(copy.target.dtype)) for copy in copies)
    return copies if kept and len(copies) == len(seen) else None


def _copy_of(operation: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> _Copy | None:
    """The operation, if it copies of one of the tensors."""
    import torch

    if operation is not torch.ops.aten.copy_.default:
        return None
    target, source = args[:2]
    for number, tensor in enumerate(tensors):
        place = source.data_ptr() - tensor.data_ptr()
        if 0 <= place < tensor.nbytes and source.dtype == tensor.dtype and source.shape == target.shape:
            offset = place // source.itemsize
            return _Copy(target.detach(), number, tuple(source.shape), tuple(source.stride()), offset)
    return None
