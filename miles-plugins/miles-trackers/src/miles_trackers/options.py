"""Options of this plugin's trackers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Curves:
    """every: steps between two drawings (about a second of the driver's time each); 0 draws only at the end.
    smoothing: steps over which a smoothed curve looks back, on average.
    """

    every: int = 50
    smoothing: float = 8.0

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every must not be negative, got {self.every}")
        if self.smoothing < 1:
            raise ValueError(f"smoothing must be at least 1, got {self.smoothing}")


@dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """logdir: what `tensorboard --logdir` is pointed at; the run gets a folder of its name there. Without it, events go
    to the folder `tensorboard` of the run folder, and `tensorboard --logdir runs` shows all runs.
    """

    logdir: str | None = None


@dataclass(frozen=True, kw_only=True)
class WandB:
    """What `wandb.init` takes, by its own names; see W&B's documentation.

    entity, project, notes, tags, group, job_type: as there. run_name: `name` there; by default the name that the run
    has in Miles. mode: by default what WANDB_MODE says, else "online"; "offline" only writes to the run folder, for
    `wandb sync`. settings: fields of `wandb.Settings`.
    """

    entity: str | None = None
    project: str = "miles"
    run_name: str | None = None
    notes: str | None = None
    tags: tuple[str, ...] = ()
    group: str | None = None
    job_type: str | None = None
    mode: Literal["online", "offline", "disabled", "shared"] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MLflow:
    """tracking_uri: of the server, "http://host:5000", or of a database file, "sqlite:///mlflow.db"; by default what
    MLFLOW_TRACKING_URI says, else MLflow's own default. experiment_name: made if it is not there. run_name: by default
    the name that the run has in Miles. tags: of the run.
    """

    tracking_uri: str | None = None
    experiment_name: str = "miles"
    run_name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
