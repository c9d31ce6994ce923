"""The tracker `mlflow` with a database file, read back by MLflow's own client."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from read_back import info

from miles_core.errors import MissingExtraError, UserError
from miles_trackers import options
from miles_trackers.mlflow import MLflow


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests, because making one takes seconds."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def the_run(database: str, experiment: str) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=database)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def points(database: str, run: Any, metric: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    history = MlflowClient(tracking_uri=database).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in history)


def test_mlflow_has_metrics_parameters_and_the_end(database: str, tmp_path: Path) -> None:
    settings = options.MLflow(tracking_uri=database, experiment_name="whole", tags={"who": "me"})
    tracker = MLflow(settings, info(tmp_path))
    tracker.log(0, {"eval/reward": 0.125})
    tracker.log(1, {"reward": 0.25, "mismatch/kl": math.nan, "odd:name": 1.0})
    assert the_run(database, "whole").info.status == "RUNNING"
    tracker.log(7, {"reward": 0.5})
    tracker.log(7, {"eval/reward": 0.75})
    tracker.finish()
    run = the_run(database, "whole")
    assert (run.info.run_name, run.info.status, run.data.tags["who"]) == ("test", "FINISHED", "me")
    assert run.data.params == {
        "seed": "3", "loss.name": "grpo", "loss.clip_high": "0.28", "filters": '["nonzero-std"]',
    }  # fmt: skip
    assert points(database, run, "reward") == [(1, 0.25), (7, 0.5)]
    assert points(database, run, "eval/reward") == [(0, 0.125), (7, 0.75)]
    assert math.isnan(points(database, run, "mismatch/kl")[0][1])
    assert points(database, run, "odd_name") == [(1, 1.0)]


def test_after_a_resume_it_is_the_same_run_and_no_step_is_there_twice(database: str, tmp_path: Path) -> None:
    settings = options.MLflow(tracking_uri=database, experiment_name="resumed")
    crashed = MLflow(settings, info(tmp_path))
    for step in range(7):
        crashed.log(step, {"reward": float(step)})  # and nobody calls `finish`
    crashed.log(4, {"eval/reward": 0.5})
    again = MLflow(settings, replace(info(tmp_path), resumed=4))
    for step in range(5, 8):
        again.log(step, {"reward": float(step), "late": 1.0})
    again.log(7, {"eval/reward": 0.75})
    again.finish()
    run = the_run(database, "resumed")
    assert run.info.status == "FINISHED"
    assert points(database, run, "reward") == [(step, float(step)) for step in range(8)]
    assert points(database, run, "eval/reward") == [(4, 0.5), (7, 0.75)]
    assert points(database, run, "late") == [(5, 1.0), (6, 1.0), (7, 1.0)]


def test_a_run_that_stops_early_has_failed(database: str, tmp_path: Path) -> None:
    tracker = MLflow(options.MLflow(tracking_uri=database, experiment_name="short"), info(tmp_path))
    tracker.log(3, {"reward": 1.0})
    tracker.finish()
    assert the_run(database, "short").info.status == "FAILED"


def test_more_than_one_request_takes(database: str, tmp_path: Path) -> None:
    config = {f"key{number}": number for number in range(150)}
    tracker = MLflow(options.MLflow(tracking_uri=database, experiment_name="big"), info(tmp_path, config=config))
    tracker.log(1, {f"metric{number}": float(number) for number in range(1050)})
    tracker.finish()
    data = the_run(database, "big").data
    assert data.params == {key: str(value) for key, value in config.items()}
    assert data.metrics == {f"metric{number}": float(number) for number in range(1050)}


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"(?s)127\.0\.0\.1.*MLFLOW_TRACKING_URI"):
        MLflow(options.MLflow(tracking_uri="http://127.0.0.1:9"), info(tmp_path))


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingExtraError) as caught:
        MLflow(options.MLflow(), info(tmp_path))
    assert str(caught.value) == (
        "tracker mlflow needs mlflow, which is not installed: pip install 'miles-trackers[mlflow]'"
    )
