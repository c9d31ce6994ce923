"""Metrics as JSON lines."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from miles_core.plugins import discover, resolve
from miles_core.roles import RunInfo
from miles_core.run.data import Jsonl
from miles_core.run.trackers import JsonLines, forget_after, read_metrics
from miles_core.specs import DataSourceSpec, TrackerSpec


def info(folder: Path) -> RunInfo:
    return RunInfo(name="run", folder=folder, config={}, steps=3)


def lines(folder: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_log_is_one_line_on_the_disk_at_once(tmp_path: Path) -> None:
    tracker = JsonLines(None, info(tmp_path))
    metrics: dict[str, Any] = {"reward": 0.25, "loss": np.float32(0.5)}
    tracker.log(0, metrics)
    (line,) = lines(tmp_path)
    assert abs(line.pop("time") - time.time()) < 60  # type: ignore[operator]
    assert line == {"step": 0, "reward": 0.25, "loss": 0.5}
    tracker.finish()


def test_values_that_are_not_finite_become_null_and_nan_again(tmp_path: Path) -> None:
    tracker = JsonLines(None, info(tmp_path))
    tracker.log(1, {"loss": math.nan, "kl": math.inf, "reward": 1.0})
    tracker.finish()
    assert {name: lines(tmp_path)[0][name] for name in ("loss", "kl")} == {"loss": None, "kl": None}
    ((step, metrics),) = read_metrics(tmp_path)
    assert step == 1
    assert metrics.pop("reward") == 1.0
    assert all(math.isnan(value) for value in metrics.values())


def test_a_resumed_run_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    first = JsonLines(None, info(tmp_path))
    first.log(0, {"reward": 1.0})
    first.finish()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "tim')
    second = JsonLines(None, info(tmp_path))
    second.log(1, {"reward": 2.0})
    second.finish()
    assert list(read_metrics(tmp_path)) == [(0, {"reward": 1.0}), (1, {"reward": 2.0})]


def test_a_run_that_is_resumed_from_its_beginning_leaves_no_empty_line(tmp_path: Path) -> None:
    first = JsonLines(None, info(tmp_path))
    first.log(1, {"reward": 1.0})
    first.finish()
    forget_after(tmp_path, -1)  # there was no checkpoint yet
    second = JsonLines(None, info(tmp_path))
    second.log(1, {"reward": 2.0})
    second.finish()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["reward"] == 2.0


def test_a_folder_without_metrics_has_none(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path)) == []


def test_tracker_and_data_source_of_one_name_are_kept_apart() -> None:
    catalog = discover(disable=["*"])
    assert resolve(catalog.get(TrackerSpec, "jsonl").spec.ref) is JsonLines
    assert resolve(catalog.get(DataSourceSpec, "jsonl").spec.ref) is Jsonl
