"""Rules of a recipe: it is planned as `miles plan` does it, without starting anything."""

from __future__ import annotations

from collections.abc import Iterator

from miles_core.errors import UserError
from miles_core.specs import RecipeSpec
from miles_core.testing.subject import Subject, skip


def can_be_planned(subject: Subject[RecipeSpec]) -> Iterator[str]:
    """`miles plan` accepts it, where everything that it requires is installed."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    from miles_core.plugins import discover
    from miles_core.run.plan import make_plan

    for text in subject.spec.requires:
        requirement = Requirement(text)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            skip(f"it requires {text}, which is not installed")
        if not requirement.specifier.contains(found, prereleases=True):
            skip(f"it requires {text}, and {found} is installed")
    try:
        make_plan(f"{subject.plugin.name}:{subject.spec.name}", [f"folder={subject.folder}"], discover())
    except UserError as error:
        yield str(error)


RULES = (can_be_planned,)
