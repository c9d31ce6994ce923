"""Memory of tensors, put aside in host memory and brought back.

Megatron's tensors are views of one another: parameters and gradients of large buffers, the optimizer's float32 weights
of parameters. So it is not tensors that move but the memory below them, which is emptied in place: every view is whole
again when it is filled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Offload:
    """Memory that has been put aside."""

    def __init__(self) -> None:
        self._held: list[tuple[Any, int, Tensor | None]] = []

    def put(self, tensors: Iterable[Tensor], *, content: bool = True) -> None:
        """Frees the memory of tensors, which must not be used until `take`. content: False if all is zero."""
        for storage in _storages(tensors):
            size = storage.nbytes()
            host = None
            if content:
                host = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                host.copy_(_bytes(storage))
            storage.resize_(0)
            self._held.append((storage, size, host))

    def take(self) -> None:
        """The opposite of `put`, for all that was put aside."""
        for storage, size, host in self._held:
            storage.resize_(size)
            if host is None:
                _bytes(storage).zero_()
            else:
                _bytes(storage).copy_(host)
        self._held.clear()


def _storages(tensors: Iterable[Tensor]) -> list[Any]:
    """The memory below tensors, each once, without what is empty already."""
    found = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return [storage for storage in found.values() if storage.nbytes()]


def _bytes(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
