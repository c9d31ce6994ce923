"""Device memory that is given back while an engine needs it, and comes again.

Whole storages move, not tensors: Megatron keeps parameters, gradients and optimizer shards as views into a few large
buffers, and the views stay what they are while their storage is empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Held:
    """A storage that was emptied. size: its bytes; host: what it held, None for what comes back as zeros."""

    storage: torch.UntypedStorage
    device: torch.device
    size: int
    host: Tensor | None


class Offload:
    """Empties and refills storages. Host copies are kept, pinned, for the next time."""

    def __init__(self) -> None:
        self._held: list[_Held] = []
        self._hosts: dict[int, Tensor] = {}

    def sleep(self, kept: Iterable[Tensor], scratch: Iterable[Tensor]) -> None:
        """Empties the storages of all tensors; those of `scratch` alone are not worth a copy. Once is enough."""
        if self._held:
            return
        seen: set[int] = set()
        for tensors, copies in ((kept, True), (scratch, False)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.size() and storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    self._held.append(self._emptied(storage, tensor.device, len(self._held), copies=copies))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for held in self._held:
            held.storage.resize_(0)

    def _emptied(self, storage: torch.UntypedStorage, device: torch.device, number: int, *, copies: bool) -> _Held:
        size = storage.size()
        host = None
        if copies:
            host = self._hosts.get(number)
            if host is None or len(host) != size:
                host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
                self._hosts[number] = host
            host.copy_(_bytes(storage, device), non_blocking=True)
        return _Held(storage, device, size, host)

    def wake(self) -> None:
        """Refills them."""
        for held in self._held:
            held.storage.resize_(held.size)
            content = _bytes(held.storage, held.device)
            if held.host is None:
                content.zero_()
            else:
                content.copy_(held.host, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._held.clear()


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
