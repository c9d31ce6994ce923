"""Checkpoints: folders that appear under their final name only when they are complete.

    checkpoints/step-00000010/    state.json, trainer/ (the trainer's own), collector.json, buffer.npz

A crash while saving leaves a folder with another name, which the next save removes; the previous checkpoint stays
whole. The policy at the end of a run is written in the same way.
"""

from __future__ import annotations

import json
import os
import re
import secrets
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


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return run / FOLDER / f"step-{step:08d}"


class Saving:
    """`async with Saving(run, final) as folder:` write into `folder`; leaving the block without an error gives it the
    name `final`, once it is on the disk. Raises `RunError` when something cannot be written."""

    def __init__(self, run: Path, final: Path) -> None:
        self._run, self._final = run, final
        # Another name each time: a process that outlived its run and still writes must not meet the next attempt.
        self._folder = final.with_name(f".{final.name}.{secrets.token_hex(4)}.incomplete")

    async def __aenter__(self) -> Path:
        try:
            for left_over in self._folder.parent.glob(".*.incomplete"):
                _remove(left_over)
            self._folder.mkdir(parents=True)
        except OSError as refused:
            raise self._failure(refused) from refused
        return self._folder

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            try:
                self._publish()
                return
            except OSError as refused:
                error = refused
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, OSError | RunError):
            raise self._failure(error) from error

    def _publish(self) -> None:
        sync(self._folder)
        if self._final.exists():
            _discard(self._final)
        self._folder.rename(self._final)
        _sync(self._final.parent)

    def _failure(self, error: OSError | RunError) -> RunError:
        """What is lost, and what is not."""
        if isinstance(error, RunError):
            reason, cause = error.message, error.cause
        else:
            reason, cause = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else ""), None
        whole = all_of(self._run)
        last = f"The checkpoint of step {whole[-1].step} is whole" if whole else "There is no checkpoint yet"
        again = f"{last}; once that is mended, go on with: miles resume {self._run}"
        return RunError(f"{self._final} could not be saved: {reason}\n{again}", cause)


def keep_newest(run: Path, count: int) -> None:
    """Removes all checkpoints but the newest `count`."""
    for old in all_of(run)[:-count]:
        _discard(old.folder)


def _discard(folder: Path) -> None:
    """Removes a checkpoint; half of one never stays under its name."""
    leaving = folder.with_name(f".{folder.name}.leaving.incomplete")
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _remove(left_over: Path) -> None:
    if left_over.is_dir():
        shutil.rmtree(left_over)
    else:
        left_over.unlink()


def sync(folder: Path) -> None:
    """Waits until everything in a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


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
