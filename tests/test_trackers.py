"""A run that fails and is resumed: every tracker has each step once, and so says each tracker's own reader."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from run_kit import RUN, Miles

sys.path.insert(0, str(Path(__file__).parents[1] / "miles-plugins/miles-trackers/tests"))

from read_back import tensorboard_points, wandb_history  # type: ignore[import-not-found, unused-ignore]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("mlflow", "sqlalchemy", "tensorboard", "wandb")),
        reason="needs miles-trackers[mlflow,tensorboard,wandb]",
    ),
]

TRACKERS = """
trackers = [
    "tensorboard",
    { name = "wandb", mode = "offline", settings = { silent = true, x_disable_stats = true } },
    { name = "mlflow", tracking_uri = "sqlite:///mlflow.db" },
]
"""


def mlflow_steps(database: Path, metric: str) -> list[int]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    (run,) = client.search_runs([client.get_experiment_by_name("miles").experiment_id])
    assert run.info.status == "FINISHED"
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, metric))


def test_after_a_resume_no_tracker_has_a_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    miles = Miles(tmp_path)
    (tmp_path / "tracked.toml").write_text(TRACKERS + RUN)
    folder = tmp_path / "runs/tracked"

    ended = miles.run("train", "tracked.toml", "schedule.steps=6", "checkpoint.every=2", probe={"full_disk": 4})
    assert (ended.code, ended.left_over) == (1, [])
    assert [row["_step"] for row in wandb_history(folder) if "loss" in row] == ["1", "2", "3", "4"]

    ended = miles.run("resume", str(folder))
    assert (ended.code, ended.left_over) == (0, []), ended.err
    logged = [line["step"] for line in miles.metrics("tracked") if "loss" in line]
    assert logged == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in tensorboard_points(folder / "tensorboard", "loss")] == logged
    assert [int(row["_step"]) for row in wandb_history(folder) if "loss" in row] == logged
    assert mlflow_steps(tmp_path / "mlflow.db", "loss") == logged


def test_a_tracker_whose_extra_is_missing_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    miles = Miles(tmp_path)
    (tmp_path / "site/wandb.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')\n")
    (tmp_path / "tracked.toml").write_text(TRACKERS + RUN)
    ended = miles.run("train", "tracked.toml", 'trackers=["wandb"]')
    assert (ended.code, ended.left_over) == (2, [])
    message = "tracker wandb needs wandb, which is not installed: pip install 'miles-trackers[wandb]'"
    assert ended.err == f"Error: {message}\n"
    assert not (tmp_path / "runs/tracked").exists()
