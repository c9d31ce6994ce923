"""`miles plan`: a run, resolved and checked, with the origin of every value, its processes and their memory."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from miles_core.cli.console import table

if TYPE_CHECKING:
    from miles_core.config.estimate import Estimate, Processes
    from miles_core.config.schema import Plan
    from miles_core.config.source import Key


@click.command()
@click.argument("target", metavar="FILE_OR_RECIPE")
@click.argument("overrides", metavar="[KEY=VALUE]... [-- FLAG...]", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One object with everything.")
def plan(target: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a run and show it resolved, without starting anything.

    Overrides are values of the run file by their dotted names: loss.clip_high=0.3, stages.NAME.schedule.steps=5,
    reward.0.weight=2.

    After -- stand flags of the trainer's and the engine's own software, by their own names:
    -- --tensor-model-parallel-size 2.
    """
    from miles_core.config.estimate import estimate
    from miles_core.config.layers import open_catalog
    from miles_core.run.plan import make_plan

    catalog = open_catalog(target, overrides)
    made = make_plan(target, overrides, catalog)
    guess = estimate(made, catalog)
    if as_json:
        click.echo(json.dumps(_as_json(made, guess), indent=2, ensure_ascii=False, default=str))
    elif sys.stdout.isatty():
        _draw(made, guess)
    else:
        _print(made, guess)


def _as_json(plan: Plan, guess: Estimate) -> dict[str, Any]:
    return {
        "name": plan.name,
        "folder": str(plan.folder),
        "steps": plan.steps,
        "plugins": [{"plugin": name, "version": version} for name, version, _ in plan.plugin_set],
        "values": plan.values,
        "origins": dict(plan.origins),
        "notes": list(_notes(plan)),
        "parameters": guess.parameters,
        "memory_unknown": guess.unknown or None,
        "processes": [dataclasses.asdict(processes) for processes in guess.processes],
    }


# ---- Rows, the same for both ways of showing them --------------------------------------------------------------------


def _value_rows(plan: Plan) -> Iterator[tuple[Key, str, str]]:
    """(path, value, origin) of every value."""
    from miles_core.config.components import completed
    from miles_core.config.source import dotted, shown
    from miles_core.run.plan import named_leaves

    for path, node in named_leaves(completed(plan.values, None)):
        yield path, shown(node.plain()), plan.origins[dotted(path)]


def _process_rows(guess: Estimate) -> Iterator[tuple[str, str, str, str, str]]:
    for processes in guess.processes:
        device = f"{processes.gpus} GPU" if processes.gpus else f"{processes.threads} CPU"
        yield processes.name, str(processes.count), device, *_memory(processes, guess.unknown)


def _memory(processes: Processes, unknown: str) -> tuple[str, str]:
    from miles_core.config.estimate import readable

    if processes.name in ("driver", "collector"):
        return "", "no model"
    if unknown or not processes.memory:
        return "unknown", unknown
    parts = "; ".join(f"{what} {readable(size)}" for what, size in processes.memory.items())
    return readable(sum(processes.memory.values())), parts


def _summary(plan: Plan, guess: Estimate) -> Iterator[str]:
    yield f"Run {plan.name}: {plan.steps} steps, in {plan.folder}"
    yield f"Plugins: {', '.join(f'{name} {version}' for name, version, _ in plan.plugin_set)}"
    if guess.parameters is not None:
        yield f"Parameters: {guess.parameters:,}"
    yield from _notes(plan)


def _notes(plan: Plan) -> Iterator[str]:
    """What else holds of all runs, and of this one does not."""
    for name in dict.fromkeys(stage.loss.spec.name for stage in plan.stages if stage.loss.spec.compares_samples):
        yield f"Note: loss {name!r} compares the samples of a micro-batch, so results depend on how they are packed"


_PROCESS_HEADER = ("Process", "Count", "Each on", "Memory", "Of which")


def _print(plan: Plan, guess: Estimate) -> None:
    for line in _summary(plan, guess):
        click.echo(line)
    click.echo()
    rows = [(".".join(map(str, path)), value, origin) for path, value, origin in _value_rows(plan)]
    table(("Value", "Is", "From"), rows)
    click.echo()
    table(_PROCESS_HEADER, _process_rows(guess))


def _draw(plan: Plan, guess: Estimate) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    values = Table("Value", "Is", "From", box=None, pad_edge=False, header_style="bold")
    for indent, name, value, origin in _indented(plan):
        style = "dim" if origin == "default" else ""
        heading = "bold cyan" if not value else ""
        values.add_row(Text("  " * indent + name, style=heading), Text(value, style=style), Text(origin, style="dim"))
    processes = Table(*_PROCESS_HEADER, box=None, pad_edge=False, header_style="bold")
    for row in _process_rows(guess):
        processes.add_row(*map(Text, row))
    for line in _summary(plan, guess):
        console.print(Text(line))
    console.print("", values, "", processes, sep="\n")


def _indented(plan: Plan) -> Iterator[tuple[int, str, str, str]]:
    """The values as a tree: (depth, last part of the name, value, origin), with a row for every new table."""
    above: Key = ()
    for (*path, key), value, origin in _value_rows(plan):
        tables = tuple(path)
        shared = 0
        while shared < min(len(above), len(tables)) and above[shared] == tables[shared]:
            shared += 1
        for depth in range(shared, len(tables)):
            yield depth, str(tables[depth]), "", ""
        above = tables
        yield len(tables), str(key), value, origin
