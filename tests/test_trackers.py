"""A run that fails and is resumed: every tracker has each step once, and so says each tracker's own reader."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import one_process
import pytest
from run_kit import RUN, Miles

from miles_core.errors import RunError
from miles_core.run.trackers import read_metrics
from miles_torch.trainer import TorchTrainer

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
    rows = [json.dumps({"prompt": f"{number} + 1 =", "answer": number + 1}) for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "tracked.toml").write_text(TRACKERS + RUN.replace('callbacks = ["probe"]', ""))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/tracked"

    save = TorchTrainer.save

    def save_once(trainer: TorchTrainer, to: Path) -> None:
        if "step-00000004" in str(to):
            raise RunError("the disk is full")
        save(trainer, to)

    monkeypatch.setattr(TorchTrainer, "save", save_once)
    with pytest.raises(RunError, match="the disk is full"):
        one_process.train(
            "tracked.toml", ["schedule.steps=6", "checkpoint.every=2"], one_process.catalog(), monkeypatch
        )
    assert [row["_step"] for row in wandb_history(folder) if "loss" in row] == ["1", "2", "3", "4"]

    monkeypatch.setattr(TorchTrainer, "save", save)
    steps = one_process.resume(folder, one_process.catalog(), monkeypatch)
    logged = [int(step) for step, metrics in read_metrics(folder) if "loss" in metrics]
    assert len(steps) == 6
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
