"""A Hugging Face folder, written tensor by tensor: never more of the model than one file is held in memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_core.roles import BucketLayout
from miles_torch.checkpoint import save_file

FILE_BYTES = 4 * 2**30
"""A file holds at most this much, unless it is one larger tensor."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")


def write(folder: Path, source: Path, layout: Sequence[BucketLayout], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """The weights, with everything that stands beside those of `source`: config, tokenizer, templates.

    tensors: in the order of `layout`, which says what there will be. Raises `OSError` if the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_rest(source, folder, layout[0].dtype)
    parts = _files(layout)
    stream = iter(tensors)
    where: dict[str, str] = {}
    for number, names in enumerate(parts, start=1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        held = {}
        for name in names:
            found, tensor = next(stream)
            assert found == name
            held[name] = tensor.detach().to("cpu").contiguous()
        save_file(held, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(names, file))
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(size for _, size in _sizes(layout))}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _sizes(layout: Sequence[BucketLayout]) -> Iterator[tuple[str, int]]:
    for bucket in layout:
        width = getattr(torch, bucket.dtype).itemsize
        for name, shape in zip(bucket.names, bucket.shapes, strict=True):
            yield name, math.prod(shape) * width


def _files(layout: Sequence[BucketLayout]) -> list[list[str]]:
    """Which tensors go into which file."""
    files: list[list[str]] = []
    room = 0
    for name, size in _sizes(layout):
        if not files or size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(name)
        room -= size
    return files


def copy_rest(source: Path, folder: Path, dtype: str | None = None) -> None:
    """What stands beside the weights of `source`: config, tokenizer, templates. dtype: what config.json shall say."""
    weights = {path for pattern in _WEIGHTS for path in source.glob(pattern)}
    for path in sorted(source.iterdir()):
        if path.is_file() and path not in weights:
            shutil.copyfile(path, folder / path.name)
    if dtype is not None:
        config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        text = json.dumps({**config, "dtype": dtype}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
