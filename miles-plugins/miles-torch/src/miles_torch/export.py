"""Weights on their way out: flat buckets of Hugging-Face-named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from miles_core.roles import Bucket, BucketLayout
from miles_core.run.tokenizers import load_tokenizer
from miles_torch.checkpoint import disk_errors
from miles_torch.model import config_of
from miles_torch.sharding import whole

BUCKET_BYTES = 256 * 2**20
"""A bucket holds at most this much, unless it is one larger tensor."""


def layout(weights: Mapping[str, Tensor], dtype: torch.dtype) -> list[BucketLayout]:
    """The buckets in which `weights` go, in their order."""
    parts: list[list[str]] = []
    size = 0
    for name, tensor in weights.items():
        if not parts or size + tensor.numel() * dtype.itemsize > BUCKET_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.numel() * dtype.itemsize
    return [
        BucketLayout(
            names=tuple(names),
            shapes=tuple(tuple(weights[name].shape) for name in names),
            dtype=str(dtype).removeprefix("torch."),
        )
        for names in parts
    ]


def buckets(weights: Mapping[str, Tensor], layouts: Sequence[BucketLayout], *, keep: bool) -> Iterator[Bucket]:
    """Gathers and copies one bucket at a time. A collective; keep: whether this rank's buckets hold the bytes."""
    for bucket in layouts:
        flat = torch.empty(0)
        place = 0
        for name in bucket.names:
            full = whole(weights[name])
            if not keep:
                continue
            if not place:
                size = sum(math.prod(other) for other in bucket.shapes)
                flat = torch.empty(size, dtype=getattr(torch, bucket.dtype), device=full.device)
            flat[place : place + full.numel()].copy_(full.reshape(-1))
            place += full.numel()
        yield Bucket(names=bucket.names, shapes=bucket.shapes, flat=flat)


def pretrained(weights: Mapping[str, Tensor], source: Path, folder: Path) -> None:
    """A Hugging Face folder of whole weights on the CPU, with config, generation config and tokenizer of `source`."""
    config = config_of(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=next(iter(weights.values())).dtype)  # type: ignore[no-untyped-call]
    model.load_state_dict(dict(weights), strict=False, assign=True)
    model.tie_weights()
    try:
        model.generation_config = GenerationConfig.from_pretrained(str(source))
    except OSError:  # the source has none, and what was made from its config stays
        model.generation_config = GenerationConfig.from_model_config(config)
    with disk_errors(folder):
        model.save_pretrained(folder)
    cast(Any, load_tokenizer(source)).save_pretrained(folder)
