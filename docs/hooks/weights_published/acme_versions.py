"""Notes when all engines have new weights."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="versions",
        ref="acme_versions:Versions",
        runs_on=frozenset({"trainer"}),
        summary="Says in the trainer's log which versions all engines have",
    )


class Versions:
    def __init__(self, options: None) -> None: ...

    def weights_published(self, context, version) -> None:
        if context.rank == 0:
            print(f"all engines have version {version}", flush=True)
