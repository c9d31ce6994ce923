"""Shows what `loss.old_policy = "recompute"` and a reference cost: each is a forward pass over the batch."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="count-passes",
        ref="acme_passes:Passes",
        runs_on=frozenset({"trainer"}),
        summary="Says in the trainer's log at which steps a pass without gradient is made",
    )


class Passes:
    def __init__(self, options: None) -> None: ...

    def before_logprobs(self, context, step) -> None:
        print(f"step {step}: a forward pass without gradient", flush=True)
