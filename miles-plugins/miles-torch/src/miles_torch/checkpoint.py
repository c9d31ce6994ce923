"""Checkpoints of a trainer: safetensors and JSON, whole tensors, so that any number of ranks can read them.

    weights-00000.safetensors …     the policy, by Hugging Face names; float32
    reference-00000.safetensors …   the frozen reference, if there is one
    optimizer-00000.safetensors …   "<parameter>/<moment>"
    random.safetensors              "<rank>/cpu" and "<rank>/cuda": torch's random states
    trainer.json                    counts of steps

Rank 0 gathers one tensor after another and writes a file whenever it holds `FILE_BYTES`; the other ranks only take
part in gathering. The caller makes the folder appear under its final name.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from miles_core.errors import UserError
from miles_torch.sharding import like, local, whole

FILE_BYTES = 4 * 2**30
"""A file is closed once it holds this much, so that rank 0 never needs much more memory than that."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns safetensors' report of a failed write into the `OSError` that it was."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        code = int(found.group(1)) if found else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


class Writer:
    """Writes whole tensors under `folder/<stem>-00000.safetensors` as they come.

    An error of the disk is kept until `finish`: with several ranks, gathering must go on or the others would wait.
    writes: whether this is rank 0; the others only take part in gathering.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self._folder, self._writes = folder, writes
        self._error: OSError | None = None

    def write(self, stem: str, tensors: Mapping[str, Tensor]) -> None:
        """Gathers and writes them all. A collective where they are sharded."""
        held: dict[str, Tensor] = {}
        files = 0
        for name, tensor in tensors.items():
            full = whole(tensor)
            if not self._writes or self._error is not None:
                continue
            held[name] = full.to("cpu").contiguous()
            if sum(other.nbytes for other in held.values()) >= FILE_BYTES:
                self._file(held, f"{stem}-{files:05}")
                held, files = {}, files + 1
        if held:
            self._file(held, f"{stem}-{files:05}")

    def _file(self, tensors: dict[str, Tensor], stem: str) -> None:
        if self._error is None:
            try:
                save_file(tensors, self._folder / f"{stem}.safetensors")
            except OSError as error:
                self._error = error

    def finish(self, states: Sequence[Mapping[str, Tensor]], record: Mapping[str, Any]) -> None:
        """The random states of all ranks and the record. Raises the first `OSError` there was."""
        if not self._writes:
            return
        flat = {f"{rank}/{name}": state for rank, own in enumerate(states) for name, state in own.items()}
        self._file(flat, "random")
        if self._error is not None:
            raise self._error
        (self._folder / "trainer.json").write_text(json.dumps({"format": 1, **record}) + "\n", encoding="utf-8")


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, on the disk when this returns. Raises `OSError` if it cannot be written."""
    with disk_errors(path):
        safetensors.torch.save_file(tensors, path, metadata=metadata)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def names(folder: Path, stem: str) -> list[str]:
    """The names of all tensors that a `Writer` wrote under a stem."""
    found: list[str] = []
    for path in sorted(folder.glob(f"{stem}-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.extend(file.keys())
    return found


def read(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """What a `Writer` wrote, one tensor after another, on the CPU."""
    for path in sorted(folder.glob(f"{stem}-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def fill(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    """Copies what a `Writer` wrote into tensors that are there, sharded or not. Raises `UserError` if they differ."""
    missing = set(tensors)
    for name, full in read(folder, stem):
        if name not in tensors or tensors[name].shape != full.shape:
            raise UserError(f"{folder}: {stem} {name!r} {tuple(full.shape)} does not fit this run's model.")
        local(tensors[name]).copy_(local(like(full, tensors[name])))
        missing.discard(name)
    if missing:
        raise UserError(f"{folder}: {stem} lacks {len(missing)} tensors, such as {min(missing)!r}.")


def random_states() -> dict[str, Tensor]:
    """torch's generators in this process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(folder: Path, rank: int) -> None:
    """The opposite of `random_states`. A rank that the checkpoint does not know keeps the state it has."""
    with safe_open(folder / "random.safetensors", framework="pt") as file:
        names = set(file.keys())
        if f"{rank}/cpu" in names:
            torch.set_rng_state(file.get_tensor(f"{rank}/cpu"))
        if f"{rank}/cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor(f"{rank}/cuda"))
