"""Writes down which machine a run is on."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="machine",
        ref="acme_machine:Machine",
        runs_on=frozenset({"driver"}),
        summary="machine.txt in the run folder: where the run runs",
    )


class Machine:
    def __init__(self, options: None) -> None: ...

    def run_start(self, run) -> None:
        import platform

        (run.folder / "machine.txt").write_text(f"{platform.node()} {platform.platform()}\n")
