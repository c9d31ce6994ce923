"""What an optimizer step reports: sums of per-token values over micro-batches and ranks, and their summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Sums:
    """name -> sum and count of values, in float64 on the device, so that nothing waits until `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor, *, count: bool = True) -> None:
        """Adds a tensor's elements. count: False if only the name counts, on a dummy micro-batch."""
        total = values.detach().sum(dtype=torch.float64)
        self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + (total if count else 0.0)
        self._counts[name] = self._counts.get(name, 0) + (values.numel() if count else 0)

    def reduce(self) -> dict[str, tuple[float, float]]:
        """name -> (sum, count) over all ranks. A collective where there are several; all must know the same names."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])
        counts = torch.tensor([self._counts[name] for name in names], dtype=torch.float64, device=self._device)
        stacked = torch.stack([sums, counts], dim=1)
        if dist.is_initialized():
            dist.all_reduce(stacked)
        return {name: (total, count) for name, (total, count) in zip(names, stacked.tolist(), strict=True)}


def report(reduced: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The loss, which is a sum; tokens; everything else as means over tokens, left out where there were none."""
    metrics = {name: total / count for name, (total, count) in reduced.items() if count}
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
        elif name == "train_seconds":
            found[name] = sum(values)
        elif name == "learning_rate":
            found[name] = values[-1]
        else:
            tokens = sum(report["tokens"] for report in known)
            found[name] = sum(report[name] * report["tokens"] for report in known) / max(1.0, tokens)
    return found
