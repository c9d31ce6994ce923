"""A command: `miles last runs/NAME` prints the newest value of each metric."""

from collections.abc import Iterable
from pathlib import Path

import click

from miles_core import CommandSpec, hookimpl


@hookimpl
def miles_commands() -> Iterable[CommandSpec]:
    yield CommandSpec(name="last", ref="acme_last:last", summary="The newest value of each metric of a run")


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
def last(folder: Path) -> None:
    """Print the newest value of each metric of the run in FOLDER."""
    from miles_core.run.trackers import read_metrics

    values: dict[str, float] = {}
    for step, metrics in read_metrics(folder):
        values |= {"step": step, **metrics}
    for name, value in values.items():
        click.echo(f"{name:30} {value:g}")
