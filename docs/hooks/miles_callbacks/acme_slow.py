"""A callback that notes slow steps."""

from collections.abc import Iterable
from dataclasses import dataclass

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="slow-steps",
        ref="acme_slow:SlowSteps",
        options="acme_slow:SlowOptions",
        runs_on=frozenset({"driver"}),
        summary="slow.txt in the run folder: the steps that took longer than a limit",
    )


@dataclass(frozen=True, kw_only=True)
class SlowOptions:
    """limit_s: what a step may take."""

    limit_s: float = 60.0


class SlowSteps:
    def __init__(self, options: SlowOptions) -> None:
        self.limit_s = options.limit_s

    def step_end(self, run, step, metrics) -> None:
        seconds = metrics.get("seconds/step", 0.0)
        if seconds > self.limit_s:
            with (run.folder / "slow.txt").open("a") as file:
                file.write(f"step {step}: {seconds:.1f} s\n")
