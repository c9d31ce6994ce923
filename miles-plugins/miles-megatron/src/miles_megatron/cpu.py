"""What lets Megatron-core 0.19, unmodified, run on a CPU over gloo.

Megatron takes CUDA for granted in a few places: it makes tensors on "cuda", asks for the current stream, and imports
Triton kernels. `install` puts stand-ins there, in this process only, and only where there is no CUDA; with CUDA it does
nothing. It must run before `megatron.core` is imported; `patch_megatron` after.

Every stand-in is one line of `_STAND_INS` or of `patch_megatron`, so that what is replaced can be read off.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "ones", "ones_like", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_KERNELS = "megatron.core.transformer.moe.ops.paged_stash"

_done = False


def install() -> bool:
    """Puts the stand-ins in place. Returns whether they are: False where there is CUDA."""
    global _done
    if torch.cuda.is_available():
        return False
    if not _done:
        _done = True
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's fusions would be compiled with g++
        _replace_torch()
        _replace_kernels()
    return True


class _Stream:
    """A stream of a device whose work is done at once; an event of it too."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record_event(self, *_: Any) -> _Stream:
        return self

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name in ("record", "synchronize", "wait", "wait_event", "wait_stream"):
            return lambda *_: None
        raise AttributeError(name)


_STREAM = _Stream()


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return make(*args, **kwargs)

    return made


def _type_of(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron recognises what it may put into one buffer by the name of its type, which must be CUDA's."""

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        inside = sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.")
        return found.replace("torch.", "torch.cuda.", 1) if inside and isinstance(found, str) else found

    return type_


_STAND_INS: dict[str, Any] = {
    "cuda.current_device": lambda: _CPU,
    "cuda.current_stream": lambda *_: _STREAM,
    "cuda.default_stream": lambda *_: _STREAM,
    "cuda.stream": lambda *_: contextlib.nullcontext(),
    "cuda.synchronize": lambda *_: None,
    "cuda.empty_cache": lambda: None,
    "cuda.Stream": _Stream,
    "cuda.Event": _Stream,
    "cuda.manual_seed": lambda seed: torch.manual_seed(seed),
    "cuda.get_rng_state": lambda *_: torch.get_rng_state(),
    "cuda.set_rng_state": lambda state, *_: torch.set_rng_state(state),
    "Tensor.cuda": lambda self, *_, **__: self,
    "Tensor.pin_memory": lambda self, *_, **__: self,
    "Tensor.record_stream": lambda *_: None,
    "Tensor.type": _type_of(torch.Tensor.type),
    "nn.Module.cuda": lambda self, *_, **__: self,
    **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES},
}
"""Place below `torch` -> what stands there without CUDA."""


def _replace_torch() -> None:
    with torch.device("meta"):
        torch.empty(0)  # PyTorch notes in its first such block which functions make tensors: it must be the plain ones
    for place, stand_in in _STAND_INS.items():
        owner, _, name = place.rpartition(".")
        setattr(functools.reduce(getattr, owner.split("."), torch) if owner else torch, name, stand_in)


def _replace_kernels() -> None:
    """Triton's kernels are imported without condition, though nothing calls them here."""
    if importlib.util.find_spec("triton") is None:
        kernels = types.ModuleType(_KERNELS)
        vars(kernels).update(GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None)
        sys.modules[_KERNELS] = kernels


# ---- After megatron.core is imported --------------------------------------------------------------------------------


def patch_megatron() -> None:
    """What gloo does otherwise than NCCL. Call after `install`."""
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    if getattr(random, "_miles", False):
        return
    random._miles = True
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    mappings._gather_along_first_dim = _uneven_gather(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _uneven_reduce_scatter(mappings._reduce_scatter_along_first_dim)


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """gloo takes split sizes as numbers and not as a tensor."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _uneven_gather(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """gloo gathers only parts of one size: pads them."""

    def gather(input_: Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, *rest: Any) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even(input_, group, output_split_sizes, *rest)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather


def _uneven_reduce_scatter(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """gloo scatters only parts of one size: sums everything everywhere and takes the own part."""

    def scatter(input_: Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, *rest: Any) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even(input_, group, input_split_sizes, *rest)
        whole = input_.contiguous().clone()
        dist.all_reduce(whole, group=group)
        parts = torch.split(whole, [int(size) for size in input_split_sizes])
        return parts[int(group.rank())].contiguous()

    return scatter
