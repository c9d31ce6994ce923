"""Sums of per-token values over micro-batches and ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Sums:
    """name -> sum and count, in float64 on the device, so that nothing waits until `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, *, count: bool = True) -> None:
        """Adds a tensor's elements. count: False for a value that only makes the name known, on a dummy."""
        values = values.detach().to(torch.float64)
        pair = torch.stack(
            [values.sum(), torch.tensor(float(values.numel()), dtype=torch.float64, device=self._device)]
        )
        self._sums[name] = self._sums.get(name, torch.zeros_like(pair)) + (pair if count else torch.zeros_like(pair))

    def reduce(self) -> dict[str, tuple[float, float]]:
        """name -> (sum, count) over all ranks. A collective where there are several; all must know the same names."""
        names = sorted(self._sums)
        if not names:
            return {}
        stacked = torch.stack([self._sums[name] for name in names])
        if dist.is_initialized():
            dist.all_reduce(stacked)
        return {name: (total, count) for name, (total, count) in zip(names, stacked.tolist(), strict=True)}
