"""Scoring: every reward of a group, in worker processes that can be killed.

Rewards are other people's code on a model's text: they raise, loop for ever inside C, return nonsense, or take the
process down. None of that may stop a run or hang it, so a reward runs in a worker of a pebble pool, in the worker's
main thread, with a time limit past which the worker is killed and replaced.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from pebble import ProcessExpired, ProcessPool

from miles_core.config.schema import Component, RewardSection
from miles_core.errors import RunError
from miles_core.run import scoring_preload, scoring_worker
from miles_core.run.scoring_worker import Outcome, RewardSetup
from miles_core.sample import Group, Sample
from miles_core.specs import RewardSpec

START_LIMIT_S = 180.0
"""The longest wait for the workers to import their rewards."""
POOL_RESTARTS = 3
"""How often one group may find the whole pool broken before the run is given up."""


class Scorer:
    """Scores groups with all rewards of a stage. Runs in the collector; the rewards run in `workers` processes.

    failures: samples that each reward failed on. busy_seconds: spent in rewards, summed over workers.
    last_traceback: of the last failure, as text. `close` it in the end.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[Component[RewardSpec], RewardSection]],
        plugin_set: Sequence[tuple[str, str, str]],
        workers: int,
    ) -> None:
        self._setups = _setups(rewards, {name: version for name, version, _ in plugin_set})
        self._weights = [section.weight for _, section in rewards]
        self._workers = workers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._opening: Future[ProcessPool] = self._thread.submit(_open, self._setups, workers)
        self.failures: Counter[str] = Counter()
        self.busy_seconds = 0.0
        self.last_traceback: str | None = None

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of each reward, by the name that it has in `Sample.rewards`."""
        return {setup.label: weight for setup, weight in zip(self._setups, self._weights, strict=True)}

    async def score(self, group: Group) -> Group:
        """The samples with `reward` (the weighted sum) and `rewards` filled.

        A sample that a reward failed on gets status "failed", reward 0 and the reason in `error`.
        Raises `RunError` if no workers can be had.
        """
        samples = [
            sample if sample.routed_experts is None else replace(sample, routed_experts=None) for sample in group
        ]
        outcomes = await asyncio.gather(*(self._outcome(place, samples) for place in range(len(self._setups))))
        for setup, outcome in zip(self._setups, outcomes, strict=True):
            self._count(setup, outcome)
        return [self._scored(sample, place, outcomes) for place, sample in enumerate(group)]

    def close(self) -> None:
        """Stops all workers, whatever they do, and waits until they are gone."""
        if self._opening.done():
            _close(self._opening)
        else:
            self._opening.add_done_callback(_close)
        self._thread.shutdown()

    async def _outcome(self, place: int, samples: Sequence[Sample]) -> Outcome:
        setup = self._setups[place]
        try:
            return await self._call(place, samples)
        except TimeoutError:
            error = f"{setup.label}: not done after {setup.timeout_s:g} s (reward.timeout_s)"
            return scoring_worker.failed(len(samples), error, trace=error, seconds=setup.timeout_s)
        except ProcessExpired as expired:
            error = f"{setup.label}: its process died with exit code {expired.exitcode}"
            return scoring_worker.failed(len(samples), error, trace=error)

    async def _call(self, place: int, samples: Sequence[Sample]) -> Outcome:
        for _ in range(POOL_RESTARTS):
            opening = self._opening
            pool = opening.result() if opening.done() else await self._opened(opening)
            try:
                future = pool.schedule(
                    scoring_worker.score_group, args=(place, samples), timeout=self._setups[place].timeout_s
                )
                return await asyncio.wrap_future(future)
            except RuntimeError:  # pebble gives the whole pool up when an idle worker dies
                if opening is self._opening:
                    self._opening = self._thread.submit(_reopen, opening, self._setups, self._workers)
        raise RunError(
            f"the reward workers died {POOL_RESTARTS} times while one group waited; is the machine out of memory?"
        )

    async def _opened(self, opening: Future[ProcessPool]) -> ProcessPool:
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(opening)), START_LIMIT_S)
        except TimeoutError:
            names = ", ".join(setup.ref for setup in self._setups)
            raise RunError(
                f"the reward workers have not started after {START_LIMIT_S:g} s; importing {names}"
            ) from None

    def _count(self, setup: RewardSetup, outcome: Outcome) -> None:
        self.busy_seconds += outcome.seconds
        if outcome.errors:
            self.failures[setup.label] += len(outcome.errors)
            self.last_traceback = outcome.traceback or next(iter(outcome.errors.values()))

    def _scored(self, sample: Sample, place: int, outcomes: Sequence[Outcome]) -> Sample:
        parts = {setup.label: outcome.scores[place] for setup, outcome in zip(self._setups, outcomes, strict=True)}
        errors = [outcome.errors[place] for outcome in outcomes if place in outcome.errors]
        if errors:
            good = {label: score for label, score in parts.items() if math.isfinite(score)}
            return replace(sample, reward=0.0, rewards=good, status="failed", error="; ".join(errors))
        total = math.fsum(weight * score for weight, score in zip(self._weights, parts.values(), strict=True))
        return replace(sample, reward=total, rewards=parts)


def _setups(
    rewards: Sequence[tuple[Component[RewardSpec], RewardSection]], versions: dict[str, str]
) -> list[RewardSetup]:
    """What workers must know; a reward that is there twice is told apart by a number."""
    seen: Counter[str] = Counter()
    setups = []
    for component, section in rewards:
        spec = component.spec
        seen[spec.name] += 1
        setups.append(
            RewardSetup(
                label=spec.name if seen[spec.name] == 1 else f"{spec.name}-{seen[spec.name]}",
                ref=spec.ref,
                options=component.options,
                scope=spec.scope,
                timeout_s=section.timeout_s,
                plugin=component.plugin,
                version=versions.get(component.plugin),
            )
        )
    return setups


def _open(setups: Sequence[RewardSetup], workers: int) -> ProcessPool:
    """A pool with a worker that is ready. Blocks for as long as the rewards' modules take to import."""
    _start_fork_server([setup.ref.partition(":")[0] for setup in setups])
    pool = ProcessPool(
        max_workers=workers,
        initializer=scoring_worker.start,
        initargs=(setups,),
        context=multiprocessing.get_context("forkserver"),
    )
    pool.schedule(os.getpid).result()
    return pool


def _start_fork_server(modules: Sequence[str]) -> None:
    """Starts this process's fork server with the rewards' modules loaded, unless one is running already.

    A Ray worker's main module imports Ray, and every forked process imports the main module anew: with Ray loaded too
    that costs nothing.
    """
    main = ["ray"] if "ray" in sys.modules else []
    multiprocessing.set_forkserver_preload([scoring_preload.__name__])
    os.environ[scoring_preload.VARIABLE] = " ".join([*main, *modules])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ[scoring_preload.VARIABLE]


def _reopen(old: Future[ProcessPool], setups: Sequence[RewardSetup], workers: int) -> ProcessPool:
    _close(old)
    return _open(setups, workers)


def _close(opening: Future[ProcessPool]) -> None:
    if opening.exception() is None:
        pool = opening.result()
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()
