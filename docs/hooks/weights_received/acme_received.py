"""Notes the version of the weights that an engine generates with."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="received",
        ref="acme_received:Received",
        runs_on=frozenset({"rollout"}),
        summary="logs/received-N.txt in the run folder: the version that each engine has",
    )


class Received:
    def __init__(self, options: None) -> None: ...

    def weights_received(self, context, version) -> None:
        (context.folder / f"received-{context.index}.txt").write_text(f"{version}\n")
