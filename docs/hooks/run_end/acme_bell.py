"""Says that a run is over: finished, failed or interrupted."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="bell",
        ref="acme_bell:Bell",
        runs_on=frozenset({"driver"}),
        summary="over.txt in the run folder, once the run is over",
    )


class Bell:
    def __init__(self, options: None) -> None: ...

    def run_end(self, run) -> None:
        (run.folder / "over.txt").write_text("over\n")
