"""Freezes the embeddings. The optimizer is made afterwards, and takes only what is trainable."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="frozen-embeddings",
        ref="acme_frozen:Frozen",
        runs_on=frozenset({"trainer"}),
        summary="Keeps the embeddings as they are",
    )


class Frozen:
    def __init__(self, options: None) -> None: ...

    def model_built(self, context, model) -> None:
        for name, parameter in model.named_parameters():
            if "embed" in name:
                parameter.requires_grad_(False)
        if context.rank == 0:
            print("embeddings are frozen", flush=True)  # into the trainer's log, in the run folder
