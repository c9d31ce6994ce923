"""Says how much of a run is done, for whoever watches the file."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="progress",
        ref="acme_progress:Progress",
        runs_on=frozenset({"driver"}),
        summary="progress.txt in the run folder: how much of the run is done",
    )


class Progress:
    def __init__(self, options: None) -> None: ...

    def step_end(self, run, step, metrics) -> None:
        (run.folder / "progress.txt").write_text(f"{step / run.steps:.0%}\n")
