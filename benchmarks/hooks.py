"""What lifecycle hooks cost a step: the calls themselves, and the two callbacks of miles-callbacks in a trainer's step.

    python benchmarks/hooks.py [--rounds 15]

First, all hooks that one step calls (driver, trainer and engine together), with callbacks that do nothing, against
plain calls of the same functions. Then a step of trainer torch on a 3.4-million-parameter Qwen3 shape, one thread,
with and without callbacks, interleaved; ratios of medians, each round's against the same round's. Exits with 1 if the
hooks of a step cost more than the limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import timeit
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from train_step import make_batch, make_trainer

from miles_callbacks import options
from miles_callbacks.aux_loss import AuxLossProbe
from miles_callbacks.nan_guard import NanGuard
from miles_core.lifecycle import LIFECYCLE, Role, lifecycle, lifecycle_hooks

A_STEP: Mapping[Role, tuple[str, ...]] = {
    "driver": ("rollout_end", "step_end"),
    "trainer": ("before_logprobs", "before_train_step", "after_train_step", "weights_published"),
    "rollout": ("weights_received",),
}
"""The hooks that are called in every step."""

LIMIT_US = 500.0
"""Most microseconds that the hooks of a step may cost with five callbacks that do nothing."""


class Idle:
    """Hears everything and does nothing."""

    def rollout_end(self, run: Any, step: int, metrics: Any) -> None: ...
    def step_end(self, run: Any, step: int, metrics: Any) -> None: ...
    def before_logprobs(self, context: Any, step: int, model: Any) -> None: ...
    def before_train_step(self, context: Any, step: int, model: Any, optimizer: Any, batch: Any) -> None: ...
    def after_train_step(self, context: Any, step: int, model: Any, optimizer: Any, metrics: Any) -> None: ...
    def weights_published(self, context: Any, version: int) -> None: ...
    def weights_received(self, context: Any, version: int) -> None: ...


def calls_of_a_step(callbacks: list[Any]) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """Every hook that a step calls, with arguments."""
    found = []
    for role, names in A_STEP.items():
        hooks = lifecycle(role, callbacks)
        for name in names:
            parameters = lifecycle_hooks(role)[name].__code__.co_varnames
            taken = parameters[1 : lifecycle_hooks(role)[name].__code__.co_argcount]
            found.append((getattr(hooks, name), dict.fromkeys(taken)))
    return found


def call_all(calls: list[tuple[Callable[..., Any], dict[str, Any]]]) -> None:
    """Each function with its arguments."""
    for function, arguments in calls:
        function(**arguments)


def microseconds(function: Callable[[], object], number: int = 2000) -> float:
    """The least of five repetitions, which is the one that nothing disturbed."""
    return min(timeit.repeat(function, number=number, repeat=5)) / number * 1e6


def measure_calls() -> float:
    """Prints the cost of a step's hooks for several numbers of callbacks, and returns that for five."""
    of_five = 0.0
    for count in (0, 1, 5, 20):
        calls = calls_of_a_step([Idle() for _ in range(count)])
        cost = microseconds(partial(call_all, calls))
        print(f"{count:3} callbacks: {cost:7.1f} us for the {len(calls)} hooks of a step")
        of_five = cost if count == 5 else of_five
    idle = Idle()
    plain = [getattr(idle, name) for names in A_STEP.values() for name in names]
    known = [arguments for _, arguments in calls_of_a_step([])]
    cost = microseconds(partial(call_all, list(zip(plain, known, strict=True))))
    print(f"  plain calls: {cost:7.1f} us")
    return of_five


def measure_steps(rounds: int, folder: Path) -> None:
    """Prints what callbacks add to a trainer's step."""
    batch = make_batch(8, 4, 64, 64)
    sides: dict[str, list[Any]] = {
        "without callbacks": [],
        "five that do nothing": [Idle() for _ in range(5)],
        "nan-guard": [NanGuard(options.NanGuard())],
        "aux-loss-probe": [AuxLossProbe(options.AuxLossProbe())],
    }
    trainers = {name: make_trainer(folder / name, lifecycle("trainer", callbacks)) for name, callbacks in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(rounds + 2):
        for name, trainer in trainers.items():
            seconds = timeit.timeit(partial(trainer.update, batch, step, 1), number=1)
            if step >= 2:  # the first ones allocate
                times[name].append(seconds)
    base = times["without callbacks"]
    for name, own in times.items():
        ratio = statistics.median(one / other for one, other in zip(own, base, strict=True))
        print(f"{name:22} {statistics.median(own) * 1e3:7.1f} ms a step, {ratio:.3f} times")


def main() -> int:
    """Measures both, and says whether the hooks keep their limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    assert set(A_STEP) == set(LIFECYCLE)
    cost = measure_calls()
    with tempfile.TemporaryDirectory() as folder:
        measure_steps(rounds, Path(folder))
    return 0 if cost <= LIMIT_US else 1


if __name__ == "__main__":
    sys.exit(main())
