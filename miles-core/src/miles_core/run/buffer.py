"""The collector's part of a checkpoint: a JSON file, and the buffered samples as plain arrays beside it.

collector.json    where the data stands; each buffered sample's text, reward, status …
buffer.npz        "<group>/<index>/<field>": the sample's arrays; never pickled
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles_core.sample import Group, Sample

_ARRAYS = ("prompt", "response", "mask", "logprobs", "versions", "routed_experts")
_FIELDS = ("group", "index", "status", "text", "reward", "rewards", "error", "answer", "metadata", "baseline")


def save(folder: Path, state: Mapping[str, Any], groups: Mapping[int, tuple[int, Group]]) -> None:
    """Writes state and buffered groups (with the version at which each was begun). Metadata must be plain JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    described = []
    for version, group in groups.values():
        for sample in group:
            at = f"{sample.group}/{sample.index}"
            arrays |= {f"{at}/{name}": getattr(sample, name) for name in _ARRAYS if getattr(sample, name) is not None}
        described.append([version, [{name: getattr(sample, name) for name in _FIELDS} for sample in group]])
    (folder / "collector.json").write_text(json.dumps({**state, "groups": described}, ensure_ascii=False), "utf-8")
    np.savez(folder / "buffer.npz", allow_pickle=False, **arrays)


def load(folder: Path) -> tuple[dict[str, Any], dict[int, tuple[int, Group]]]:
    """The opposite of `save`."""
    state = json.loads((folder / "collector.json").read_text("utf-8"))
    groups: dict[int, tuple[int, Group]] = {}
    with np.load(folder / "buffer.npz", allow_pickle=False) as arrays:
        for version, described in state.pop("groups"):
            group = [_sample(fields, arrays) for fields in described]
            groups[group[0].group] = (version, group)
    return state, groups


def _sample(fields: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Sample:
    at = f"{fields['group']}/{fields['index']}"
    found: dict[str, Any] = {name: arrays[f"{at}/{name}"] for name in _ARRAYS if f"{at}/{name}" in arrays}
    return Sample(**fields, **found)
