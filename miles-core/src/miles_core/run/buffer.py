"""The collector's part of a checkpoint: a JSON file, and the arrays of the buffered samples beside it, packed.

collector.json    where the data stands; each buffered sample's text, reward, status … and its lengths
buffer.npz        each array field of all samples, end to end; never pickled

A prompt's answer and metadata are not written: metadata may hold anything, and the data source gives both again. What
a rollout has added to the metadata was for the rewards, which have been given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles_core.sample import Group, Prompt, Sample

_PROMPT, _RESPONSE = ("prompt",), ("response", "mask", "logprobs", "versions")
_FIELDS = ("group", "index", "status", "text", "reward", "rewards", "error", "baseline", "weight")


def save(folder: Path, state: Mapping[str, Any], groups: Mapping[int, tuple[int, Group]]) -> None:
    """Writes state and buffered groups (with the version at which each was begun)."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [sample for _, group in groups.values() for sample in group]
    described = [[version, [_described(sample) for sample in group]] for version, group in groups.values()]
    arrays: dict[str, Any] = {}
    if samples:
        arrays = {
            name: np.concatenate([getattr(sample, name) for sample in samples]) for name in (*_PROMPT, *_RESPONSE)
        }
    arrays |= {f"routed_experts/{place}": s.routed_experts for place, s in enumerate(samples) if _routed(s)}
    (folder / "collector.json").write_text(json.dumps({**state, "groups": described}), "utf-8")
    np.savez(folder / "buffer.npz", allow_pickle=False, **arrays)


def _described(sample: Sample) -> dict[str, Any]:
    lengths = [len(sample.prompt), len(sample.response)]
    return {**{name: getattr(sample, name) for name in _FIELDS}, "lengths": lengths}


def _routed(sample: Sample) -> bool:
    return sample.routed_experts is not None


def load(folder: Path, prompt_of: Callable[[int], Prompt]) -> tuple[dict[str, Any], dict[int, tuple[int, Group]]]:
    """The opposite of `save`. prompt_of: the prompt of a group, from the data source."""
    state = json.loads((folder / "collector.json").read_text("utf-8"))
    groups: dict[int, tuple[int, Group]] = {}
    with np.load(folder / "buffer.npz", allow_pickle=False) as arrays:
        reader = _Reader(dict(arrays))
        for version, described in state.pop("groups"):
            prompt = prompt_of(described[0]["group"])
            groups[prompt.id] = (version, [reader.sample(fields, prompt) for fields in described])
    return state, groups


class _Reader:
    """Cuts the arrays into samples again, in the order in which they were written."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = arrays
        self._place = self._prompt = self._response = 0

    def sample(self, fields: dict[str, Any], prompt: Prompt) -> Sample:
        """The next one."""
        prompt_length, response_length = fields.pop("lengths")
        found = self._cut(_PROMPT, self._prompt, prompt_length) | self._cut(_RESPONSE, self._response, response_length)
        experts = self._arrays.get(f"routed_experts/{self._place}")
        self._place, self._prompt = self._place + 1, self._prompt + prompt_length
        self._response += response_length
        return Sample(**fields, **found, routed_experts=experts, answer=prompt.answer, metadata=prompt.metadata)

    def _cut(self, names: tuple[str, ...], start: int, length: int) -> dict[str, Any]:
        return {name: self._arrays[name][start : start + length] for name in names}
