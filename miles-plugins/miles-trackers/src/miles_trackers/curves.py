"""Tracker `curves`: what a run did, in one picture of four panels.

Reward per step; held-out score; how far policy, reference and engine are apart; and where the time went.
"""

from __future__ import annotations

from collections.abc import Mapping

from miles_core.roles import RunInfo
from miles_core.run.trackers import read_metrics
from miles_trackers import options
from miles_trackers.picture import Rows, draw

PICTURE = "curves.png"


class Curves:
    """Keeps what is logged and draws it. `roles.Tracker`. After a resume it begins with what was logged before."""

    def __init__(self, settings: options.Curves, run: RunInfo) -> None:
        self._settings = settings
        self._run = run
        self._rows: Rows = {}
        for step, metrics in read_metrics(run.folder):
            self._keep(step, metrics)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps a step's metrics; every few steps, draws."""
        self._keep(step, metrics)
        if self._settings.every and step and step % self._settings.every == 0:
            self._draw()

    def finish(self) -> None:
        """Draws."""
        self._draw()

    def _keep(self, step: int, metrics: Mapping[str, float]) -> None:
        self._rows.setdefault(step, {}).update(metrics)

    def _draw(self) -> None:
        if self._rows:
            draw(self._rows, self._run, self._run.folder / PICTURE, self._settings.smoothing)
