"""What trackers have written, read by others than themselves: rows of (step, metrics), or points of (step, value)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miles_core.roles import RunInfo

BLOCK = 32768
"""Bytes of a block of a .wandb file, which is a LevelDB log with a header of its own."""


def info(folder: Path, **changes: Any) -> RunInfo:
    """A run of seven steps."""
    config = {"seed": 3, "loss": {"name": "grpo", "clip_high": 0.28}, "filters": ["nonzero-std"]}
    return RunInfo(**{"name": "test", "folder": folder, "config": config, "steps": 7, **changes})


def tensorboard_points(folder: Path, metric: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a metric."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(metric)]


def wandb_history(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's history, values as JSON, after every `wandb sync` in the order of the files: one that goes on
    from a step takes the history back to it."""
    rows: list[dict[str, str]] = []
    for file in _files(folder):
        for record in _records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run" and record.run.HasField("branch_point"):
                point = record.run.branch_point
                assert (point.run, point.metric) == (record.run.run_id, "_step")
                rows = [row for row in rows if int(row["_step"]) <= point.value]
            if kind == "history":
                rows.append({"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item})
    return rows


def wandb_exits(folder: Path) -> list[int]:
    """The exit code of each process."""
    files = _files(folder)
    records = [record for file in files for record in _records(file)]
    return [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]


def wandb_runs(folder: Path) -> list[Any]:
    """The first record about the run, of each process."""
    return [
        next(record.run for record in _records(file) if record.WhichOneof("record_type") == "run")
        for file in _files(folder)
    ]


def _files(folder: Path) -> list[Path]:
    """In the order of their processes, once W&B's own process has written them: `Run.finish` does not wait for that."""
    import wandb

    wandb.teardown()
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.parent.name)


def _records(file: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, part = 7, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        _, size, kind = struct.unpack_from("<IHB", data, at) if left >= 7 else (0, 0, 0)
        if kind == 0:  # the rest of the block is empty
            at += left
            continue
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""
