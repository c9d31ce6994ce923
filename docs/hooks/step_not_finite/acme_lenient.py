"""Skips a few steps whose loss or gradient is not finite; then lets the run stop."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="lenient",
        ref="acme_lenient:Lenient",
        runs_on=frozenset({"trainer"}),
        summary="Skips up to three steps that are not finite",
    )


class Lenient:
    def __init__(self, options: None) -> None: ...

    skipped = 0

    def step_not_finite(self, step, fault) -> bool | None:
        self.skipped += 1
        print(f"step {step}: {fault}", flush=True)
        return True if self.skipped <= 3 else None  # None leaves it to the next callback; nobody else decides: stop
