"""A filter for prompts that the policy solves sometimes: never and always give no gradient to group-relative losses."""

from collections.abc import Iterable

from miles_core import FilterSpec, hookimpl


@hookimpl
def miles_filters() -> Iterable[FilterSpec]:
    yield FilterSpec(
        name="sometimes-solved",
        ref="acme_mixed:SometimesSolved",
        summary="Keeps prompts with at least one solved and one unsolved sample",
    )


class SometimesSolved:
    def __init__(self, options: None) -> None: ...

    def keep(self, group) -> bool:
        solved = [(sample.reward or 0.0) >= 1.0 for sample in group]
        return any(solved) and not all(solved)
