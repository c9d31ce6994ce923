"""Remembers the best evaluation."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="best-evaluation",
        ref="acme_best:Best",
        runs_on=frozenset({"driver"}),
        summary="best.txt in the run folder: the step whose evaluation was best",
    )


class Best:
    def __init__(self, options: None) -> None: ...

    best = float("-inf")

    def eval_end(self, run, step, metrics) -> None:
        reward = metrics.get("eval/reward", self.best)
        if reward > self.best:
            self.best = reward
            (run.folder / "best.txt").write_text(f"{step} {reward:.3f}\n")
