"""Checkpoints: folders that appear under their final name only when they are complete.

    checkpoints/step-00000010/    state.json, trainer/ (the trainer's own), collector.json, buffer.npz

A crash while saving leaves a folder with another name, which the next save removes; the previous checkpoint stays
whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_core.errors import RunError, UserError

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete one. step: steps done, which is also the version of its weights."""

    step: int
    folder: Path

    @property
    def state(self) -> dict[str, Any]:
        """What the loop wrote of itself."""
        try:
            state: dict[str, Any] = json.loads((self.folder / "state.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"checkpoint {self.folder} is damaged ({error}); remove it to go on from the one before"
            ) from error
        return state


def all_of(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        Checkpoint(int(match.group(1)), path)
        for path in (run / FOLDER).glob("step-*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


class Saving:
    """`async with Saving(run, step, keep) as folder:` write into `folder`; leaving the block without an error makes it
    the checkpoint of `step` and removes all but the newest `keep`. Raises `RunError` when the disk refuses."""

    def __init__(self, run: Path, step: int, keep: int) -> None:
        self.final = run / FOLDER / f"step-{step:08d}"
        self._run, self._keep = run, keep
        self._folder = self.final.with_name(f".{self.final.name}.incomplete")

    async def __aenter__(self) -> Path:
        for left_over in self._folder.parent.glob(".step-*.incomplete"):
            shutil.rmtree(left_over)
        self._folder.mkdir(parents=True)
        return self._folder

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            try:
                self._publish()
                return
            except OSError as refused:
                error = refused
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(
                f"the checkpoint {self.final} could not be saved: {error.strerror or error}. The one before it is "
                f"whole; make room and go on with: miles resume {self._run}"
            ) from error

    def _publish(self) -> None:
        for path in [*self._folder.rglob("*"), self._folder]:
            _sync(path)
        if self.final.exists():
            shutil.rmtree(self.final)
        self._folder.rename(self.final)
        _sync(self.final.parent)
        for old in all_of(self._run)[: -self._keep]:
            shutil.rmtree(old.folder)


def _sync(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """The loop's own part of a checkpoint."""
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", "utf-8")
