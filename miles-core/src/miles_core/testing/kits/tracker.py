"""Rules of a tracker: it follows short made-up runs, of which some have nothing to say and one fails."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

from miles_core.roles import Tracker
from miles_core.specs import TrackerSpec
from miles_core.testing.fakes import make_run
from miles_core.testing.subject import Subject

_ENVIRONMENT = dict(os.environ)
"""As this process began; since then, libraries may have put into it what makes a child no process of its own."""
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
    """After a process that ended in the middle of its run, a new one goes on from a checkpoint, or begins again."""
    aside = subject.folder / "aside"
    aside.mkdir()
    works = subject.make(make_run(aside))  # if it does not at all, that shows here and not in the other process
    works.log(1, METRICS)
    works.finish()
    code = (
        "import json, pickle, sys\n"
        "sys.path[:] = json.loads(sys.argv[1])\n"
        "from miles_core.testing.kits.tracker import crash\n"
        "crash(pickle.load(sys.stdin.buffer))"
    )
    done = subprocess.run(  # noqa: S603 — our own interpreter
        [sys.executable, "-c", code, json.dumps(sys.path)],
        input=pickle.dumps(subject),
        env=_ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        yield f"in a process of its own: {(done.stderr.decode().strip().splitlines() or ['no message'])[-1]}"
        return
    run = make_run(subject.folder)
    for resumed, step in ((1, 2), (None, 0)):
        tracker = subject.make(replace(run, resumed=resumed))
        tracker.log(step, METRICS)
        tracker.finish()


def crash(subject: Subject[TrackerSpec]) -> NoReturn:
    """A process that dies in the middle of a run."""
    tracker = subject.make(make_run(subject.folder))
    for step in range(3):
        tracker.log(step, METRICS)
    os._exit(0)


RULES = (follows_a_run, survives_a_run_without_metrics, survives_a_run_that_fails)
