"""`miles doctor`: what is installed, and what a run lacks."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from miles_core.cli.console import table

if TYPE_CHECKING:
    from miles_core.installation import Machine, Need
    from miles_core.plugins import Catalog
    from miles_core.run.needed import Missing


@click.command()
@click.argument("target", metavar="[FILE_OR_RECIPE]", required=False)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One object with everything.")
@click.pass_context
def doctor(ctx: click.Context, target: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say what is installed of what the plugins declare, and what this machine is.

    With a run file or a recipe, say too what it lacks here, and what to install; overrides are as in miles train.
    Exit with 1 if it lacks something, or if a plugin does not load, else with 0.
    """
    from miles_core.config.layers import open_catalog
    from miles_core.installation import machine
    from miles_core.plugins import discover
    from miles_core.run.needed import missing

    catalog = discover() if target is None else open_catalog(target, overrides)
    here = machine()
    lacking = None if target is None else missing(target, overrides, catalog, here)
    if as_json:
        click.echo(json.dumps(_as_json(catalog, here, lacking), indent=2, ensure_ascii=False))
    else:
        _print(catalog, here, target, lacking)
    broken = any(plugin.status in ("failed", "incompatible") for plugin in catalog.plugins)
    ctx.exit(1 if broken or lacking else 0)


def _extras(catalog: Catalog) -> Iterator[tuple[str, list[Need]]]:
    """Every extra of every plugin, as pip calls it, with what it needs."""
    from miles_core.installation import extras, needs

    for plugin in catalog.plugins:
        for extra in extras(plugin.name):
            yield f"{plugin.name}[{extra}]", list(needs(plugin.name, extra))


def _install(lacking: list[Missing]) -> str | None:
    """The one command that installs what pip can, None if that is nothing."""
    wanted = sorted({one.install for one in lacking if one.install is not None})
    return f"pip install {' '.join(map(shlex.quote, wanted))}" if wanted else None


def _as_json(catalog: Catalog, here: Machine, lacking: list[Missing] | None) -> dict[str, Any]:
    said: dict[str, Any] = {
        "machine": dataclasses.asdict(here),
        "plugins": [
            {"plugin": plugin.name, "version": plugin.version, "status": plugin.status, "reason": plugin.reason}
            for plugin in catalog.plugins
        ],
        "extras": {name: [dataclasses.asdict(need) for need in needed] for name, needed in _extras(catalog)},
    }
    if lacking is not None:
        said |= {"missing": [dataclasses.asdict(one) for one in lacking], "install": _install(lacking)}
    return said


def _print(catalog: Catalog, here: Machine, target: str | None, lacking: list[Missing] | None) -> None:
    table(("This machine", ""), _machine(here))
    click.echo()
    table(
        ("Plugin", "Version", "Status"),
        [(plugin.name, plugin.version, f"{plugin.status} {plugin.reason}".strip()) for plugin in catalog.plugins],
    )
    click.echo()
    rows = [
        (name, need.requirement, f"{need.found or 'not installed'}{'' if need.good or not need.found else ', another'}")
        for name, needed in _extras(catalog)
        for need in needed
    ]
    table(("Extra", "Needs", "Installed"), rows)
    if target is not None and lacking is not None:
        click.echo()
        _print_missing(target, lacking)


def _machine(here: Machine) -> Iterator[tuple[str, str]]:
    yield "python", f"{here.python} on {here.platform}"
    yield "torch", f"{here.torch or 'not installed'}{f', built for CUDA {here.cuda}' if here.cuda else ''}"
    for gpu in here.gpus:
        yield "gpu", f"{gpu.name}, {gpu.memory}, driver {gpu.driver}"
    if not here.gpus:
        yield "gpu", "none that nvidia-smi shows"


def _print_missing(target: str, lacking: list[Missing]) -> None:
    if not lacking:
        click.echo(f"{target}: nothing is missing, and it can be planned")
        return
    click.echo(f"{target}: missing")
    for one in lacking:
        click.echo(f"  {one.what}")
    if command := _install(lacking):
        click.echo(f"\n{command}")
