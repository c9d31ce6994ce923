"""Tracker `tensorboard`: metrics as event files, for `tensorboard --logdir runs`.

A run that goes on from a checkpoint writes where it does, and TensorBoard leaves out what was written of later steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from miles_core.extras import import_extra
from miles_core.roles import RunInfo
from miles_trackers import options

FOLDER = "tensorboard"
"""Of the event files, in the run folder."""

_import = partial(import_extra, needed_by="tracker tensorboard", install="miles-trackers[tensorboard]")


class TensorBoard:
    """Writes what is logged at once, so that a crash loses nothing. `roles.Tracker`."""

    def __init__(self, settings: options.TensorBoard, run: RunInfo) -> None:
        writer = _import("tensorboard.summary.writer.event_file_writer")
        self._events = _import("tensorboard.compat.proto.event_pb2")
        self._summaries = _import("tensorboard.compat.proto.summary_pb2")
        folder = run.folder / FOLDER if settings.logdir is None else Path(settings.logdir).expanduser() / run.name
        self._writer = writer.EventFileWriter(str(folder))
        first = 0 if run.resumed is None else run.resumed + 1
        self._write(first, session_log=self._events.SessionLog(status=self._events.SessionLog.START))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event."""
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step, summary=self._summaries.Summary(value=values))

    def finish(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()
