"""`miles recipes`: the ready run files of the installed plugins."""

from __future__ import annotations

import click

from miles_core.cli.console import table


@click.group()
def recipes() -> None:
    """List and show ready run files."""


@recipes.command("list")
def list_recipes() -> None:
    """List the recipes: what `miles train NAME` and `miles plan NAME` accept."""
    from miles_core.plugins import discover
    from miles_core.specs import RecipeSpec

    rows = [(entry.spec.name, entry.plugin.name, entry.spec.summary) for entry in discover().all(RecipeSpec)]
    table(("Recipe", "Plugin", "Summary"), rows)


@recipes.command("show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print the run file of a recipe, to read or to start one's own from."""
    from miles_core.config.layers import recipe_text
    from miles_core.plugins import discover
    from miles_core.specs import RecipeSpec

    click.echo(recipe_text(discover().get(RecipeSpec, name)), nl=False)
