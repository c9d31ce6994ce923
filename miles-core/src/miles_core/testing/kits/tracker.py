"""Rules of a tracker: it follows short made-up runs, of which some have nothing to say and one fails."""

from __future__ import annotations

import math
from collections.abc import Iterator

from miles_core.roles import Tracker
from miles_core.specs import TrackerSpec
from miles_core.testing.fakes import make_run
from miles_core.testing.subject import Subject

METRICS = {"reward": 0.5, "mismatch/kl": 1e-6, "seconds/train": 0.2, "tokens": 128.0}


def follows_a_run(subject: Subject[TrackerSpec]) -> Iterator[str]:
    """It takes metrics of every step, and an evaluation's at a step that it has heard of already."""
    tracker = subject.make(make_run(subject.folder))
    if not isinstance(tracker, Tracker):
        yield f"{type(tracker).__name__} lacks `log` or `finish`"
        return
    for step in range(5):
        tracker.log(step, METRICS)
    tracker.log(4, {"eval/reward": 0.75})
    tracker.finish()


def survives_a_run_without_metrics(subject: Subject[TrackerSpec]) -> Iterator[str]:
    """A run without a step, a step without metrics, and metrics that are not finite are no reason to raise."""
    subject.make(make_run(subject.folder)).finish()
    tracker = subject.make(make_run(subject.folder))
    tracker.log(0, {})
    tracker.log(1, {"loss": math.nan, "grad_norm": math.inf})
    tracker.finish()
    yield from ()


def survives_a_run_that_fails(subject: Subject[TrackerSpec]) -> Iterator[str]:
    """After a run that never finished, a new tracker goes on in the same folder."""
    first = subject.make(make_run(subject.folder))
    first.log(1, METRICS)
    second = subject.make(make_run(subject.folder))  # what `miles resume` does; nobody called `first.finish`
    second.log(2, METRICS)
    second.finish()
    yield from ()


RULES = (follows_a_run, survives_a_run_without_metrics, survives_a_run_that_fails)
