"""Who hears of a run in the driver: its trackers, and its callbacks there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from miles_core.cluster.process import hooks_of
from miles_core.config.schema import Component, Plan
from miles_core.errors import explained
from miles_core.roles import RunInfo, Tracker
from miles_core.run.producer import built
from miles_core.run.trackers import METRICS_FILE, JsonLines
from miles_core.specs import TrackerSpec


class Observers:
    """What one of them raises stops the run, as an error that says who it was. Metrics go into the run folder in any
    case."""

    def __init__(self, plan: Plan, info: RunInfo) -> None:
        self._info = info
        self._hooks = hooks_of(plan, "driver")
        self._trackers = [(one.spec.name, self._tracker(one)) for one in plan.trackers]
        if not any(isinstance(tracker, JsonLines) for _, tracker in self._trackers):
            self._trackers.insert(0, (METRICS_FILE, JsonLines(None, info)))

    def _tracker(self, component: Component[TrackerSpec]) -> Tracker:
        with _blaming(f"tracker {component.spec.name}"):
            tracker: Tracker = built(component, self._info)
            return tracker

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics to all trackers."""
        for name, tracker in self._trackers:
            with _blaming(f"tracker {name}"):
                tracker.log(step, metrics)

    def tell(self, event: str, **what: Any) -> None:
        """Calls a lifecycle hook of the callbacks."""
        with _blaming(f"the callback hook {event}"):
            getattr(self._hooks, event)(run=self._info, **what)

    def finish(self) -> None:
        """The trackers hear that the run is over."""
        for name, tracker in self._trackers:
            with _blaming(f"tracker {name}"):
                tracker.finish()


@contextlib.contextmanager
def _blaming(who: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise explained(error, who, "in the driver") from error
