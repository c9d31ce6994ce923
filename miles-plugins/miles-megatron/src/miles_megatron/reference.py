"""The frozen reference: weights in host memory that take the place of the policy's for a while.

Policy and reference are exchanged one tensor after another, so neither is ever held twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Reference:
    """A copy of a rank's weights. Its memory is allocated once and is such as a GPU reads and writes directly."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.tensors = [torch.empty_like(own, device="cpu", pin_memory=own.device.type == "cuda") for own in weights]
        """In the order of the weights; what is loaded into them is the reference."""
        self.remember(weights)

    def remember(self, weights: Sequence[Tensor]) -> None:
        """Becomes a copy of the weights as they are now."""
        with torch.no_grad():
            for own, other in zip(weights, self.tensors, strict=True):
                other.copy_(own)

    @contextmanager
    def in_place_of(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Within this, the weights are the reference's."""
        self._swap(weights)
        try:
            yield
        finally:
            self._swap(weights)

    def _swap(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for own, other in zip(weights, self.tensors, strict=True):
                held = own.clone()
                own.copy_(other, non_blocking=True)
                other.copy_(held, non_blocking=True)
        if any(own.device.type == "cuda" for own in weights):
            torch.cuda.synchronize()

    def for_writing(self) -> list[Tensor]:
        """What a forked process may write while this one goes on: pinned memory is not copied for it."""
        return [tensor.clone() if tensor.is_pinned() else tensor for tensor in self.tensors]
