"""The folder of a run while a process works in it."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from miles_core.errors import UserError
from miles_core.run import checkpoint
from miles_core.run.trackers import METRICS_FILE


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else works in the folder meanwhile. Raises `UserError` if somebody does.

    The lock is the kernel's, so it ends with the process, however that ends.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run {folder} is going on in another process; wait for its end, or stop it") from None
        yield


@contextlib.contextmanager
def removed_if_refused(folder: Path) -> Iterator[None]:
    """Removes a new run's folder again when bad input ends the run before it has done anything: the same command shall
    work once the input is mended."""
    try:
        yield
    except UserError:
        metrics = folder / METRICS_FILE
        if not checkpoint.all_of(folder) and not (metrics.is_file() and metrics.stat().st_size):
            shutil.rmtree(folder, ignore_errors=True)
        raise
