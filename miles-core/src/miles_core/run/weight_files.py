"""What a model folder's weights look like from outside: which are damaged or absent, found without reading them.

A safetensors file begins with 8 bytes, the length of its header, little-endian; the header is JSON and says where each
tensor's bytes lie behind it. So a file that a broken download left too short shows, at the cost of its header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_core.errors import UserError

Shape = tuple[int, ...]
INDEX = "model.safetensors.index.json"
"""Says which tensor is in which file, where there are several."""

_LENGTH = 8
_MOST = 100_000_000
"""A header has at most as many bytes, as in the safetensors library."""


def check_weights(folder: Path) -> None:
    """Raises `UserError` if a model folder has only pickled weights, or a safetensors file that is cut short, or lacks
    one that its index names. A folder without any weights is a new model. Imports nothing."""
    files = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled and not files:
        raise UserError(
            f"{folder} has its weights only as {pickled[0]}; save it again with transformers' `save_pretrained`, "
            "which writes safetensors"
        )
    held = {name: tensors(path) for name, path in files.items()}
    for tensor, file in _index(folder).items():
        if file not in held:
            raise UserError(f"{folder} lacks {file}, which its {INDEX} names; download the model again")
        if tensor not in held[file]:
            raise UserError(f"{folder / file} lacks the tensor {tensor}, which its {INDEX} names")


def check_tensors(folder: Path, expected: Mapping[str, Shape | None], ignored: Iterable[str]) -> None:
    """Raises `UserError` unless a model folder holds each of the `expected` tensors, in its shape or, for None, in any,
    and no others but those whose name one of the regular expressions `ignored` matches. Reads headers alone."""
    held = {name: (path, said) for path in sorted(folder.glob("*.safetensors")) for name, said in tensors(path).items()}
    allowed = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"\b\B")
    if missing := sorted(expected.keys() - held.keys()):
        raise UserError(f"{folder} lacks {some(missing)}, which the model's config.json asks for")
    if extra := sorted(name for name in held.keys() - expected.keys() if not allowed.fullmatch(name)):
        raise UserError(f"{folder} holds {some(extra)}, which the model's config.json does not know")
    for name, shape in expected.items():
        path, said = held[name]
        if shape is not None and tuple(said["shape"]) != shape:
            found = tuple(said["shape"])
            raise UserError(f"{path}: {name} has shape {found}, but the model's config.json makes it {shape}")


def some(names: Sequence[str]) -> str:
    """The first of several tensors, and how many more there are, in words."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the tensor {names[0]}{more}"


def tensors(path: Path) -> Mapping[str, Any]:
    """What the header of a safetensors file says of each tensor. Raises `UserError` for a damaged or short file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            header = json.loads(file.read(length)) if length <= min(_MOST, size - _LENGTH) else None
        if not isinstance(header, dict):
            raise ValueError("it has no header")
        header.pop("__metadata__", None)
        end = _LENGTH + length + max((each["data_offsets"][1] for each in header.values()), default=0)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged or incomplete: {error}; download the model again") from error
    if size < end:
        raise UserError(f"{path} is damaged or incomplete: it has {size} bytes of {end}; download the model again")
    return header


def _index(folder: Path) -> Mapping[str, str]:
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8"))["weight_map"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}; download the model again") from error
