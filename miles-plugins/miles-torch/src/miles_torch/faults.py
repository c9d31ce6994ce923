"""What to say of a loss that is not finite: which token it is, and of which sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from miles_core.sample import Batch
from miles_torch.packing import describe


def first_not_finite(
    batch: Batch, rows: NDArray[Any], targets: NDArray[Any], predicts: str, predicted: Tensor, losses: Tensor
) -> str:
    """Names the first trained token of a micro-batch at which something is not finite; "" if everything is.

    rows: [T], their places in the batch; targets: [T], the tokens; predicts: what `predicted` [T] is, in words; losses:
    [T].
    """
    bad = torch.nonzero(~(torch.isfinite(predicted) & torch.isfinite(losses)))
    if not len(bad):
        return ""
    place = int(bad[0])
    row = int(rows[place])
    sample = int(np.searchsorted(batch.cu_seqlens, row, side="right")) - 1
    return (
        f"sample {describe(batch, sample)}, token {row - int(batch.cu_seqlens[sample])} (id {int(targets[place])}): "
        f"{predicts} {predicted[place].item():g}, loss {losses[place].item():g}"
    )


def loss_fault(found: Iterable[str], world_size: int) -> str:
    """What to say of the step, the same on every rank. found: of each micro-batch of this rank. A collective."""
    of_ranks: list[str | None] = [next(filter(None, found), None)]
    if world_size > 1:
        own, of_ranks = of_ranks[0], [None] * world_size
        dist.all_gather_object(of_ranks, own)
    where = next(filter(None, of_ranks), "the weights times the losses overflow")
    return f"{where}; the loss is not finite and the step was not taken."
