"""Lets you change the learning rate of a running job: write it into a file."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="rate-from-file",
        ref="acme_rate:Rate",
        runs_on=frozenset({"trainer"}),
        summary="The learning rate is what learning-rate.txt says, while that file exists",
    )


class Rate:
    def __init__(self, options: None) -> None: ...

    def before_train_step(self, context, step, optimizer) -> None:
        from pathlib import Path

        file = Path("learning-rate.txt")
        if file.exists():
            for group in optimizer.param_groups:
                group["lr"] = float(file.read_text())
