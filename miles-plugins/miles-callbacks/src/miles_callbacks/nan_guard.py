"""The callback `nan-guard`: one bad sample costs a step and not the run.

A step whose loss or gradient norm is not finite is skipped: gradients are dropped, weights and optimizer stay as they
are. Skipping helps against a rare sample. It cannot help where the weights themselves are not finite, or where it goes
on for several steps; then the run stops, with the trainer's own error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from miles_callbacks import options
from miles_core.roles import RunInfo, TrainerContext

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 5
"""Parameters that are named in one message."""

_log = logging.getLogger(__name__)


class NanGuard:
    """On every trainer rank it decides; in the driver it tells the person at the terminal."""

    def __init__(self, settings: options.NanGuard) -> None:
        self.settings = settings
        self.in_a_row = 0

    def step_not_finite(self, context: TrainerContext, step: int, model: Any, fault: str) -> bool:
        """Whether the step may be skipped; every rank comes to the same answer."""
        weights = _not_finite(((name, each) for name, each in model.named_parameters()), context)
        gradients = _not_finite(((name, _gradient(each)) for name, each in model.named_parameters()), context)
        skips = not weights and self.in_a_row < self.settings.patience
        self.in_a_row += 1
        if context.rank == 0:
            outcome = f"is skipped, {self.in_a_row} in a row" if skips else "stops the run"
            lines = [f"nan-guard: step {step} {outcome}. {fault}"]
            lines += [f"gradients that are not finite: {_shown(gradients)}"] if gradients else []
            lines += [f"weights that are not finite: {_shown(weights)}"] if weights else []
            _log.warning("\n  ".join(lines))
        return skips

    def after_train_step(self, metrics: dict[str, float]) -> None:
        """A step that was taken ends the row."""
        if "skipped_steps" not in metrics:
            self.in_a_row = 0

    def step_end(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        """In the driver."""
        if skipped := sum(metrics.get(name, 0.0) for name in ("skipped_steps", "critic/skipped_steps")):
            _log.warning("nan-guard: step %d: %d optimizer steps skipped; see %s", step, skipped, run.folder / "logs")


def _not_finite(tensors: Iterable[tuple[str, Tensor | None]], context: TrainerContext) -> dict[str, int]:
    """name -> number of entries that are not finite, of those that have any; summed over ranks. A collective."""
    counts = {name: _count(tensor) for name, tensor in tensors if tensor is not None}
    found = {name: count for name, count in counts.items() if count}
    if context.world_size == 1:
        return found
    import torch.distributed as dist

    of_ranks: list[dict[str, int]] = [{}] * context.world_size
    dist.all_gather_object(of_ranks, found)
    return {name: sum(rank.get(name, 0) for rank in of_ranks) for rank in of_ranks for name in rank}


def _gradient(parameter: Tensor) -> Tensor | None:
    """Where Megatron puts it, or else where PyTorch does."""
    found: Tensor | None = getattr(parameter, "main_grad", None)
    return parameter.grad if found is None else found


def _count(tensor: Any) -> int:
    """In this rank's part of it."""
    own = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
    return int((~own.isfinite()).sum())


def _shown(found: Mapping[str, int]) -> str:
    named = ", ".join(f"{name} ({count} entries)" for name, count in list(found.items())[:SHOWN])
    return named if len(found) <= SHOWN else f"{named} and {len(found) - SHOWN} more"
