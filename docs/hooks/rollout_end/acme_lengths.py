"""Notes how long responses are, before anything is trained on them."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="lengths",
        ref="acme_lengths:Lengths",
        runs_on=frozenset({"driver"}),
        summary="lengths.csv in the run folder: the mean response length of each batch",
    )


class Lengths:
    def __init__(self, options: None) -> None: ...

    def rollout_end(self, run, step, metrics) -> None:
        with (run.folder / "lengths.csv").open("a") as file:
            file.write(f"{step},{metrics.get('response_length', 0.0):.2f}\n")
