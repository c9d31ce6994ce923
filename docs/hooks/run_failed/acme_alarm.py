"""Raises the alarm when a run fails. It can neither suppress nor replace the error."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="alarm",
        ref="acme_alarm:Alarm",
        runs_on=frozenset({"driver"}),
        summary="alarm.txt in the run folder: why the run stopped",
    )


class Alarm:
    def __init__(self, options: None) -> None: ...

    def run_failed(self, run, error) -> None:
        (run.folder / "alarm.txt").write_text(f"{run.name} failed: {error}\n")
