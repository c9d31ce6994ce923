"""The worker's side of scoring: builds rewards once a process and runs them on groups. Imported in every worker.

Whatever a reward does wrong short of dying or hanging comes back as an `Outcome`; the rest is `scoring`'s business.
"""

from __future__ import annotations

import importlib.metadata
import math
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import resource
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from miles_core.errors import RunError
from miles_core.sample import Sample

ORPHAN_GRACE_S = 2.0
"""CPU seconds past its time limit after which the kernel ends a worker that nobody is left to kill."""


@dataclass(frozen=True, kw_only=True)
class RewardSetup:
    """All that a worker must know of one reward. version: of the distribution `plugin`; None where it has none."""

    label: str
    ref: str
    options: Any
    scope: Literal["sample", "group"]
    timeout_s: float
    plugin: str
    version: str | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one reward said of one group.

    scores: one a sample, NaN where it failed. errors: place in the group -> one line. traceback: of the last exception.
    seconds: wall-clock time in the worker.
    """

    scores: list[float]
    errors: dict[int, str] = field(default_factory=dict)
    traceback: str | None = None
    seconds: float = 0.0


def failed(count: int, error: str, *, trace: str | None = None, seconds: float = 0.0) -> Outcome:
    """The outcome of a reward that failed on all `count` samples."""
    return Outcome(
        scores=[math.nan] * count, errors=dict.fromkeys(range(count), error), traceback=trace, seconds=seconds
    )


_setups: list[RewardSetup] = []
_rewards: list[Any] = []
"""This worker's rewards, in the order of `_setups`; a string, the traceback, for one that could not be built."""


def start(setups: Sequence[RewardSetup]) -> None:
    """Prepares the process: it dies at once when told to, dies with its parent, and has built its rewards."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would wait for an endless loop in C
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _setups[:] = setups
    _rewards[:] = [_build(setup) for setup in setups]


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _build(setup: RewardSetup) -> Any:
    try:
        _check_version(setup)
        return pkgutil.resolve_name(setup.ref)(setup.options)
    except Exception:
        return traceback.format_exc()


def _check_version(setup: RewardSetup) -> None:
    """A worker that starts late must not import what was installed over the plugin since the run began."""
    if setup.version is None:
        return
    installed = importlib.metadata.version(setup.plugin)
    if installed != setup.version:
        raise RunError(f"{setup.plugin} is now {installed}, but the run began with {setup.version}; install it again")


def score_group(place: int, samples: Sequence[Sample]) -> Outcome:
    """The outcome of the reward at `place` on the samples of one group."""
    _limit_cpu(_setups[place].timeout_s)
    return _outcome(_setups[place], _rewards[place], samples)


def _limit_cpu(seconds: float) -> None:
    """The pool kills this process past its limit. If the pool is gone too, only the kernel can stop a loop in C."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    allowed = (seconds + ORPHAN_GRACE_S) * (os.cpu_count() or 1)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + allowed)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))


def _outcome(setup: RewardSetup, reward: Any, samples: Sequence[Sample]) -> Outcome:
    if isinstance(reward, str):
        return failed(len(samples), f"{setup.label} could not be built: {_last_line(reward)}", trace=reward)
    began = time.perf_counter()
    try:
        scores = [float(score) for score in reward.score(samples)]
        if len(scores) != len(samples):
            raise ValueError(f"returned {len(scores)} scores for {len(samples)} samples")
    except (Exception, SystemExit):
        if setup.scope == "sample" and len(samples) > 1:  # one bad sample shall not cost the others their score
            return _joined([_outcome(setup, reward, [sample]) for sample in samples])
        trace = traceback.format_exc()
        seconds = time.perf_counter() - began
        return failed(len(samples), f"{setup.label}: {_last_line(trace)}", trace=trace, seconds=seconds)
    errors = {
        place: f"{setup.label}: the score is {score}"
        for place, score in enumerate(scores)
        if not math.isfinite(score)
    }  # fmt: skip
    return Outcome(scores=scores, errors=errors, seconds=time.perf_counter() - began)


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Outcomes of single samples as that of their group."""
    return Outcome(
        scores=[outcome.scores[0] for outcome in outcomes],
        errors={place: outcome.errors[0] for place, outcome in enumerate(outcomes) if outcome.errors},
        traceback=next((outcome.traceback for outcome in reversed(outcomes) if outcome.traceback), None),
        seconds=sum(outcome.seconds for outcome in outcomes),
    )


def _last_line(trace: str) -> str:
    return trace.strip().splitlines()[-1][:300]
