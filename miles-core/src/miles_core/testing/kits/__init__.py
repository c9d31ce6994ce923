"""The rules of each kind of component, one module a kind: every rule is a function of a `Subject` that yields faults.

A rule's docstring says what should be. Rules that need PyTorch import it when they run, because core does without.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from miles_core.specs import Spec
from miles_core.testing.subject import Subject

RecordRule = Callable[[Subject[Any]], Iterable[str]]

_WITHOUT = frozenset({"command"})
"""Kinds of which a reference that resolves says everything."""


def rules_of(kind: type[Spec]) -> tuple[RecordRule, ...]:
    """The rules of one kind of record, in the order in which they are checked."""
    if kind.kind in _WITHOUT:
        return ()
    module = importlib.import_module(f"{__name__}.{kind.kind.replace(' ', '_')}")
    rules: tuple[RecordRule, ...] = module.RULES
    return rules
