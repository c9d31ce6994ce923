"""Micro-batches that only keep a trainer's ranks in step with each other, and must not count.

Ranks whose collectives must match run equally many micro-batches; one that has nothing left runs a filler, whose
objective is multiplied by 0. What adds to the objective from inside of the model (a forward hook on one of its modules)
has to leave fillers out by itself, and asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_FILLER: ContextVar[bool] = ContextVar("miles_filler", default=False)


def is_filler() -> bool:
    """Whether the forward pass that is running is of a filler."""
    return _FILLER.get()


@contextmanager
def filler(value: bool) -> Iterator[None]:
    """For trainers: what the body runs is a filler, or is none."""
    token = _FILLER.set(value)
    try:
        yield
    finally:
        _FILLER.reset(token)
