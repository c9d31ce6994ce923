"""A trainer's rank in a process of its own, for test_handles.py: a process finds this module by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sglang_kit import buckets_of

from miles_core.testing.models import make_model, trainer_context
from miles_sglang.handles import Sender


def send_as(rank: int, folder: str, pipe: Any) -> None:
    """Sends a model's weights, of which rank 0 alone has bytes, as one of two ranks."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    context = replace(trainer_context(Path(), 0), rank=rank, world_size=2, layout="colocated")
    sender = Sender(context, 1)
    pipe.send(sender.open() if rank == 0 else "")
    sender.connect()
    buckets = buckets_of(make_model())
    nothing = torch.empty(0)
    sender.send(iter([replace(one, flat=nothing if rank else one.flat.bfloat16()) for one in buckets]))
    dist.barrier()  # the store ends with rank 0
    dist.destroy_process_group()
