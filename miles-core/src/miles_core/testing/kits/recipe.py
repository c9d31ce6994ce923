"""Rules of a recipe: it is planned as `miles plan` does it, without starting anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from miles_core.errors import MissingExtraError, UserError
from miles_core.specs import RecipeSpec
from miles_core.testing.subject import Subject, skip


def can_be_planned(subject: Subject[RecipeSpec]) -> Iterator[str]:
    """`miles plan` accepts it, with the example's options over it, where everything that it requires is installed."""
    from miles_core.installation import unmet
    from miles_core.plugins import discover
    from miles_core.run.plan import make_plan

    if (need := next(unmet(subject.spec.requires), None)) is not None:
        skip(f"it requires {need.requirement}, {need.lack}")
    try:
        flags = [f"folder={subject.folder}", *(f"{name}={value}" for name, value in _dotted(subject.example.options))]
        make_plan(f"{subject.plugin.name}:{subject.spec.name}", flags, discover())
    except MissingExtraError:
        raise  # a reason not to try it
    except UserError as error:
        yield str(error)


def _dotted(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The options as flags say them: {"loss": {"clip_high": 0.3}} is loss.clip_high=0.3."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{rest}", said) for rest, said in _dotted(value))
        else:
            yield name, json.dumps(value)


RULES = (can_be_planned,)
