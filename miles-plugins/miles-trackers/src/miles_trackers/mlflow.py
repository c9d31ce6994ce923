"""Tracker `mlflow`: metrics, and the run file as parameters, to an MLflow server or into a database file.

MLflow forgets nothing that was logged. A run that goes on from a checkpoint is the same run there, and of the steps
that it does again only what is not there yet is logged.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from miles_core.errors import UserError
from miles_core.extras import import_extra
from miles_core.roles import RunInfo
from miles_trackers import options

RUN_ID = "mlflow-run-id.txt"
"""In the run folder, for a resume."""
PARAMS, METRICS = 100, 1000
"""Most of each that MLflow takes in one request."""


class MLflow:
    """One run of MLflow. `roles.Tracker`."""

    def __init__(self, settings: options.MLflow, run: RunInfo) -> None:
        mlflow = import_extra("mlflow", needed_by="tracker mlflow", install="miles-trackers[mlflow]")
        self._entities = import_extra("mlflow.entities", needed_by="tracker mlflow", install="miles-trackers[mlflow]")
        self._steps, self._last = run.steps, -1
        self._there: dict[str, int] = {}  # metric -> the last step of it that was logged before a resume
        known = run.folder / RUN_ID
        try:
            self._client = mlflow.MlflowClient(tracking_uri=settings.tracking_uri)
            if run.resumed is not None and known.is_file():
                self._go_on(known.read_text("utf-8"))
            else:
                self._begin(settings, run)
        except mlflow.MlflowException as error:
            raise UserError(
                f"tracker mlflow cannot begin: {error}\nIts server or database is its tracking_uri, or "
                "MLFLOW_TRACKING_URI in the environment."
            ) from error
        known.write_text(self._id, "utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All of them in one request."""
        self._last, now = step, int(time.time() * 1000)
        values = {_name(name): float(value) for name, value in metrics.items()}
        new = [
            self._entities.Metric(name, value, now, step)
            for name, value in values.items()
            if step > self._there.get(name, -1)
        ]
        for start in range(0, len(new), METRICS):
            self._client.log_batch(self._id, metrics=new[start : start + METRICS])

    def finish(self) -> None:
        """Says how the run ended. One that has not come to its last step has failed."""
        self._client.set_terminated(self._id, "FINISHED" if self._last == self._steps else "FAILED")

    def _begin(self, settings: options.MLflow, run: RunInfo) -> None:
        experiment = self._client.get_experiment_by_name(settings.experiment_name)
        known = self._client.create_experiment(settings.experiment_name) if experiment is None else None
        made = self._client.create_run(
            known or experiment.experiment_id, run_name=settings.run_name or run.name, tags=dict(settings.tags)
        )
        self._id: str = made.info.run_id
        params = [self._entities.Param(_name(name), value) for name, value in _flat(run.config)]
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(self._id, params=params[start : start + PARAMS])

    def _go_on(self, run_id: str) -> None:
        self._id = run_id
        self._client.update_run(run_id, status="RUNNING")
        for name in self._client.get_run(run_id).data.metrics:
            self._there[name] = max(metric.step for metric in self._client.get_metric_history(run_id, name))


def _name(name: str) -> str:
    """As MLflow accepts it."""
    return re.sub(r"[^\w\-./ ]", "_", name)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of everything in a run file; lists as JSON."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
