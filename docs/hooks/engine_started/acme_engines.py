"""Notes each engine that is up."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="engine-roll-call",
        ref="acme_engines:Engines",
        runs_on=frozenset({"rollout"}),
        summary="logs/engine-N.txt in the run folder, for each engine that is up",
    )


class Engines:
    def __init__(self, options: None) -> None: ...

    def engine_started(self, context) -> None:
        (context.folder / f"engine-{context.index}.txt").write_text("up\n")
