"""A recipe: a run file that comes with a package."""

from collections.abc import Iterable

from miles_core import RecipeSpec, hookimpl


@hookimpl
def miles_recipes() -> Iterable[RecipeSpec]:
    yield RecipeSpec(
        name="acme-subtraction",
        ref="acme_recipes:subtraction.toml",
        requires=("miles-grpo",),
        summary="The recipe arithmetic with other problems and a shorter warm-up",
    )
