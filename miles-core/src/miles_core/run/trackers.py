"""The tracker that core offers: every run's metrics as JSON lines in its folder."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from miles_core.roles import RunInfo

METRICS_FILE = "metrics.jsonl"


class JsonLines:
    """Appends {"step": …, "time": …, metric: value, …} to metrics.jsonl, flushed line by line. `roles.Tracker`.

    time: seconds since 1970. A value that is not finite becomes null, because JSON has no word for it.
    """

    def __init__(self, options: None, run: RunInfo) -> None:
        path = run.folder / METRICS_FILE
        torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")  # a crash in the middle of a line
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if torn:
            self._file.write("\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line."""
        values = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def finish(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """What was logged to the run folder, as (step, metrics) in the order of the lines; null becomes NaN.

    A step that was done again after a resume is there twice; the later line holds. Half a line is left out.
    """
    for step, values in _lines(folder):
        del values["time"]
        yield step, {name: math.nan if value is None else value for name, value in values.items()}


def _lines(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, the line's other values) of every whole line."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line)
                yield values.pop("step"), values


def forget_after(folder: Path, step: int) -> None:
    """Drops the lines of later steps, which a resumed run will write again, and half lines. A crash leaves the file
    as it was."""
    kept = [{"step": at, **values} for at, values in _lines(folder) if at <= step]
    path = folder / METRICS_FILE
    if path.is_file():
        replacement = path.with_name(f".{METRICS_FILE}.incomplete")
        replacement.write_text("".join(f"{json.dumps(line)}\n" for line in kept), "utf-8")
        replacement.replace(path)
