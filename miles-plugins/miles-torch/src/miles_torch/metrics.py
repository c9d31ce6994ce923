"""What an optimizer step reports: sums and maxima over micro-batches and ranks, and their summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_core.run.mismatch import MAXIMUM, with_shares


class Sums:
    """name -> sum and count of values, in float64 on the device, so that nothing waits until `reduce`.

    Of a name that ends in `MAXIMUM` it keeps the largest value instead. group: the ranks that `reduce` adds up, the
    default group if None.
    """

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self._device, self._group = device, group
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, *, count: bool = True) -> None:
        """Adds a tensor's elements. count: False if only the name counts, on a dummy micro-batch."""
        if name.endswith(MAXIMUM):
            values = values.detach().to(torch.float64) if count else values.new_empty(0, dtype=torch.float64)
            largest = torch.cat([values.reshape(-1), values.new_full((1,), -math.inf)]).max()
            self._maxima[name] = largest.maximum(self._maxima.get(name, largest))
            return
        total = values.detach().sum(dtype=torch.float64)
        self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + (total if count else 0.0)
        self._counts[name] = self._counts.get(name, 0) + (values.numel() if count else 0)

    def reduce(self) -> dict[str, tuple[float, float]]:
        """name -> (sum, count) over the ranks, (maximum, 1) for maxima, (0, 0) for what there is nothing of.

        A collective where there are several ranks; all must know the same names.
        """
        return self._reduced_sums() | self._reduced_maxima()

    def _reduced_maxima(self) -> dict[str, tuple[float, float]]:
        names = sorted(self._maxima)
        if not names:
            return {}
        stacked = torch.stack([self._maxima[name] for name in names])
        if dist.is_initialized():
            dist.all_reduce(stacked, op=dist.ReduceOp.MAX, group=self._group)
        found = zip(names, stacked.tolist(), strict=True)
        return {name: (largest, 1.0) if largest > -math.inf else (0.0, 0.0) for name, largest in found}

    def _reduced_sums(self) -> dict[str, tuple[float, float]]:
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])
        counts = torch.tensor([self._counts[name] for name in names], dtype=torch.float64, device=self._device)
        stacked = torch.stack([sums, counts], dim=1)
        if dist.is_initialized():
            dist.all_reduce(stacked, group=self._group)
        return {name: (total, count) for name, (total, count) in zip(names, stacked.tolist(), strict=True)}


def report(reduced: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The loss, which is a sum; tokens; all else as maxima or means over tokens, left out where there were none."""
    metrics = with_shares({name: total / count for name, (total, count) in reduced.items() if count})
    loss, tokens = reduced.get("loss", (0.0, 0.0))
    return {**metrics, "loss": loss, "tokens": tokens}


def summary(reports: Sequence[Mapping[str, float]], passes: int) -> dict[str, float]:
    """One report of several optimizer steps over `passes` passes: see `TorchTrainer.update`."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for report in reports for name in report):
        known = [report for report in reports if name in report]
        values = [report[name] for report in known]
        if name in ("loss", "grad_norm"):
            found[name] = sum(values) / len(values)
        elif name == "tokens":
            found[name] = sum(values) / passes
        elif name in ("train_seconds", "skipped_steps"):
            found[name] = sum(values)
        elif name.endswith(MAXIMUM):
            found[name] = max(values)
        elif name == "learning_rate":
            found[name] = values[-1]
        else:
            tokens = sum(report["tokens"] for report in known)
            found[name] = sum(report[name] * report["tokens"] for report in known) / max(1.0, tokens)
    return found
