"""Tracker `wandb`: metrics to Weights & Biases, or into a folder that `wandb sync` uploads later.

A run that goes on from a checkpoint is the same run there, taken back to the checkpoint's step (`resume_from`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_core.errors import UserError
from miles_core.extras import import_extra
from miles_core.roles import RunInfo
from miles_trackers import options

RUN_ID = "wandb-run-id.txt"
"""In the run folder, for a resume."""


class WandB:
    """One run of W&B; its files are in the run folder. `roles.Tracker`."""

    def __init__(self, settings: options.WandB, run: RunInfo) -> None:
        wandb = import_extra("wandb", needed_by="tracker wandb", install="miles-trackers[wandb]")
        known = run.folder / RUN_ID
        again: dict[str, Any] = {}
        if run.resumed is not None and known.is_file():
            again["resume_from"] = f"{known.read_text('utf-8')}?_step={run.resumed}"
        try:
            self._run = wandb.init(
                entity=settings.entity,
                project=settings.project,
                dir=str(run.folder),
                name=settings.run_name or run.name,
                notes=settings.notes,
                tags=list(settings.tags) or None,
                config=dict(run.config),
                group=settings.group,
                job_type=settings.job_type,
                mode=settings.mode,
                reinit="create_new",  # not one that somebody else in this process has begun
                settings=wandb.Settings(**settings.settings),
                **again,
            )
        except (wandb.Error, ValueError) as error:
            raise UserError(
                f"tracker wandb cannot begin: {error}\nTo write to the run folder instead, for `wandb sync`, set its "
                'mode = "offline", or WANDB_MODE=offline in the environment.'
            ) from error
        known.write_text(self._run.id, "utf-8")
        self._steps, self._last = run.steps, -1

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of the run's history, or more of the last one."""
        self._run.log(dict(metrics), step=step)
        self._last = step

    def finish(self) -> None:
        """Waits until everything is written or uploaded. A run that has not come to its last step has failed."""
        self._run.finish(exit_code=int(self._last < self._steps))
