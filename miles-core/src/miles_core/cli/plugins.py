"""`miles plugins`: what is installed, what it offers, and whether it keeps the rules. A broken plugin is a row here."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from miles_core.cli.console import table
from miles_core.declarations import declaration_kinds, deprecations
from miles_core.errors import PluginError
from miles_core.hooks import DeclarationHooks
from miles_core.lifecycle import LIFECYCLE, call_order, lifecycle_hooks
from miles_core.plugins import Catalog, Plugin, Status, discover, leads_nowhere, one_line, options_of, resolve
from miles_core.specs import CallbackSpec, RecipeSpec, Spec

if TYPE_CHECKING:
    from miles_core.testing.checks import Verdict

_COLOURS = {"active": "green", "disabled": "bright_black", "incompatible": "yellow", "failed": "red"}
_KINDS = {kind.kind.replace(" ", "-"): kind for kind in declaration_kinds().values()}


@click.group()
def plugins() -> None:
    """List, explain and check plugins."""


def _coloured(status: str) -> str:
    return click.style(status, fg=_COLOURS[status]) if status in _COLOURS else status


# ---- list ---------------------------------------------------------------------------------------------------------


@plugins.command("list")
@click.option("--status", type=click.Choice(get_args(Status)), help="Only plugins with this status.")
@click.option("--kind", type=click.Choice(list(_KINDS)), help="Only plugins that offer this, and only this of them.")
@click.option("--json", "as_json", is_flag=True, help="A list of objects, with everything; stable between releases.")
def list_plugins(status: str | None, kind: str | None, as_json: bool) -> None:
    """List installed plugins: what they provide and what is wrong with it, or why they are not loaded."""
    catalog = discover()
    offers = _offers(catalog)
    chosen = [plugin for plugin in catalog.plugins if status in (None, plugin.status)]
    if kind is not None:
        chosen = [plugin for plugin in map(_only(_KINDS[kind]), chosen) if plugin.records]
    if as_json:
        click.echo(json.dumps([_as_json(plugin, _faults(plugin, offers)) for plugin in chosen], indent=2))
        return
    rows = [
        (plugin.name, plugin.version, plugin.requires, plugin.status, _in_short(plugin, offers)) for plugin in chosen
    ]
    table(("Plugin", "Version", "Core", "Status", "Provides"), rows, styles={3: _coloured})


def _only(kind: type[Spec]) -> Callable[[Plugin], Plugin]:
    return lambda plugin: dataclasses.replace(
        plugin, records=tuple(record for record in plugin.records if isinstance(record, kind))
    )


def _in_short(plugin: Plugin, offers: _Offers) -> str:
    """ "loss grpo, sft; reward exact  [imports torch, so every command waits]" """
    faults = f"  [{'; '.join(found)}]" if (found := _faults(plugin, offers)) else ""
    return plugin.reason or f"{_provides(plugin.records)}{faults}"


_Offers = Mapping[tuple[str, str], list[str]]
"""(kind, name) -> the plugins that offer it."""


def _offers(catalog: Catalog) -> _Offers:
    found: dict[tuple[str, str], list[str]] = {}
    for plugin in catalog.plugins:
        for record in plugin.records:
            found.setdefault((record.kind, record.name), []).append(plugin.name)
    return found


def _faults(plugin: Plugin, offers: _Offers) -> list[str]:
    """What is wrong with an active plugin, as far as can be told at once; `check` finds more."""
    faults = [f"imports {', '.join(plugin.heavy)}, so every command waits"] if plugin.heavy else []
    if plugin.status == "active":
        faults += [f"deprecated: {text}" for text in deprecations(import_module(plugin.entry))]
    for record in plugin.records:
        others = [name for name in offers[record.kind, record.name] if name != plugin.name]
        if others:
            faults.append(f"{record.kind} {record.name} is also offered by {', '.join(others)}")
        if not isinstance(record, RecipeSpec) and leads_nowhere(record.ref):
            faults.append(f"{record.kind} {record.name}: there is no {record.ref}")
    return faults


def _provides(records: Iterable[Spec]) -> str:
    """ "loss grpo, sft; reward exact" """
    names: dict[str, list[str]] = {}
    for record in records:
        names.setdefault(record.kind, []).append(record.name)
    return "; ".join(f"{kind} {', '.join(sorted(found))}" for kind, found in names.items())


def _as_json(plugin: Plugin, faults: list[str]) -> dict[str, Any]:
    return {
        "plugin": plugin.name,
        "version": plugin.version,
        "core": plugin.requires,
        "entry": plugin.entry,
        "status": plugin.status,
        "reason": plugin.reason,
        "faults": faults,
        "provides": [
            {"kind": record.kind, "name": record.name, "summary": record.summary, "ref": record.ref}
            for record in plugin.records
        ],
    }


# ---- info ---------------------------------------------------------------------------------------------------------


@plugins.command()
@click.argument("name")
def info(name: str) -> None:
    """Show what the plugin NAME offers, with traits and options; for a failed one, its traceback."""
    plugin = discover().plugin(name)
    click.echo(f"{plugin.name} {plugin.version}  {_coloured(plugin.status)}")
    click.echo(f"module {plugin.entry}" + (f", requires miles-core{plugin.requires}" if plugin.requires else ""))
    if plugin.reason:
        click.echo(plugin.reason)
    if plugin.traceback:
        click.echo("\n" + plugin.traceback.rstrip())
    for record in plugin.records:
        click.echo()
        _show_record(record)


def _show_record(record: Spec) -> None:
    click.echo(f"{record.kind} {click.style(record.name, bold=True)}: {record.summary}")
    click.echo(f"  {record.ref}")
    for trait, value in _traits(record):
        click.echo(f"  {trait}: {value}")
    if record.options is not None:
        try:
            _show_options(record)
        except (Exception, SystemExit) as error:  # the plugin's code runs: its module, its default factories
            click.echo(f"  options {record.options} cannot be shown: {one_line(error)}")


def _show_options(record: Spec) -> None:
    options = options_of(record)
    assert options is not None
    rows = list(_options(options))
    click.echo(f"  options {record.options}")
    documentation = inspect.getdoc(options) or ""
    if not documentation.startswith(f"{options.__name__}("):  # what dataclass writes where there is none
        click.echo(textwrap.indent(documentation, "    "))
    if rows:
        table(("Option", "Type", "Default"), rows, indent=4)


def _traits(record: Spec) -> Iterator[tuple[str, str]]:
    """Every field that a kind adds to `Spec` and that is not at its default."""
    common = {field.name for field in dataclasses.fields(Spec)} - {"extra", "gpu_extra"}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name not in common and value != _default(field):
            yield field.name, _words(value)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in sorted(value.items()))
    if isinstance(value, frozenset):
        return ", ".join(sorted(map(str, value))) or "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default, `dataclasses.MISSING` if it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _options(options: type, given: Any = dataclasses.MISSING, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted name, type, default) of every option; nested dataclasses are opened. given: the default instance."""
    from miles_core.config.build import plain
    from miles_core.config.source import shown

    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        default = _default(field) if given is dataclasses.MISSING else getattr(given, field.name)
        name, hint = prefix + field.name, hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _options(hint, default, f"{name}.")
        else:
            text = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
            yield name, text, "required" if default is dataclasses.MISSING else shown(plain(default))


# ---- check --------------------------------------------------------------------------------------------------------


@plugins.command()
@click.argument("name", required=False)
@click.option("--verbose", "-v", is_flag=True, help="Every rule about every component, and why one was not tried.")
@click.pass_context
def check(ctx: click.Context, name: str | None, verbose: bool) -> None:
    """Check that the plugin NAME, or every one that is not disabled, keeps the rules; exit with 1 if one does not.

    Components are tried on made-up data and tiny models, on the CPU; see miles_core.testing.
    """
    catalog = discover()
    chosen = [catalog.plugin(name)] if name else [plugin for plugin in catalog.plugins if plugin.status != "disabled"]
    failing = [plugin.name for plugin in chosen if not _check(plugin, verbose=verbose)]
    if failing:
        click.echo(f"\n{len(failing)} of {len(chosen)} plugins break a rule: {', '.join(failing)}")
        ctx.exit(1)


def _check(plugin: Plugin, *, verbose: bool) -> bool:
    """Prints the outcome of every rule about the plugin, and of those about each of its components."""
    from itertools import groupby

    from miles_core.testing import checks

    good = True
    click.echo(f"{plugin.name} {plugin.version}")
    for record, verdicts in groupby(checks.check(plugin), key=lambda verdict: verdict.record):
        for mark, text, lines in _summary(record, verdicts) if record and not verbose else map(_outcome, verdicts):
            click.echo(f"  {click.style(mark.ljust(4), fg=_MARKS[mark])}  {text}")
            for line in lines:
                click.echo(f"        {line}")
            good = good and mark != "fail"
    return good


_MARKS = {"ok": "green", "fail": "red", "skip": "yellow", "warn": "yellow"}

_Outcome = tuple[str, str, tuple[str, ...]]
"""Mark, text, lines below it."""


def _outcome(verdict: Verdict) -> _Outcome:
    """Of one rule."""
    rule = verdict.rule.replace("_", " ")
    text = f"{verdict.record}: {rule}" if verdict.record else rule
    if verdict.skipped:
        return "skip", f"{text}: {verdict.skipped}", ()
    if verdict.faults:
        return "fail", text, verdict.faults
    return "warn" if verdict.warnings else "ok", text, verdict.warnings


def _summary(record: str, verdicts: Iterable[Verdict]) -> Iterator[_Outcome]:
    """Of the rules about one component: those that it breaks, or how many it keeps."""
    reached = list(verdicts)
    broken = [verdict for verdict in reached if verdict.faults]
    yield from map(_outcome, broken)
    if not broken:
        skipped = sum(bool(verdict.skipped) for verdict in reached)
        kept = f"{len(reached) - skipped} of {len(reached)} rules kept"
        kept += ", the others not tried" if skipped else ""
        yield "ok" if skipped < len(reached) else "skip", f"{record}: {kept}", ()


# ---- new ----------------------------------------------------------------------------------------------------------


@plugins.command()
@click.argument("name")
@click.option("--kind", required=True, help="What it brings: reward, loss, engine, ...")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write it; by default a new folder NAME here.")
def new(name: str, kind: str, folder: Path | None) -> None:
    """Write a new plugin NAME: a complete, small package with one component, its tests and a workflow to publish it."""
    from miles_core.scaffold import component_of, new_plugin

    target = Path(name) if folder is None else folder
    for file in new_plugin(name, kind, target):
        click.echo(target / file)
    component = component_of(name)
    for other in [entry.plugin.name for entry in discover().all(_KINDS[kind]) if entry.spec.name == component]:
        click.echo(
            f"\nNote: the {kind} {component!r} is also {other}'s. Where both are installed, run files must say "
            f"{name}:{component}.",
            err=True,
        )
    click.echo(f"\nNext: cd {target} && pip install -e '.[test]' && pytest && miles plugins check {name}")


# ---- hooks --------------------------------------------------------------------------------------------------------


@plugins.command()
@click.argument("target", metavar="[FILE_OR_RECIPE]", required=False)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
def hooks(target: str | None, overrides: tuple[str, ...]) -> None:
    """List every hook: its family, since which release it exists, and who implements it.

    With a run file or a recipe, list the hooks that its callbacks hear, and who hears each, in the order of the calls.
    """
    if target is not None:
        rows = list(_heard_in_run(target, overrides))
        table(("Hook", "Family", "Since", "Called, in this order"), rows)
        return
    catalog = discover()
    rows = [
        (hook, "declaration", _since(vars(DeclarationHooks)[hook]), _declarers(catalog, kind))
        for hook, kind in declaration_kinds().items()
    ]
    heard = _callbacks(catalog)
    for role in LIFECYCLE:
        for hook, spec in lifecycle_hooks(role).items():
            names = [name for name, callback in heard.items() if hasattr(callback, hook)]
            rows.append((hook, role, _since(spec), ", ".join(names)))
    table(("Hook", "Family", "Since", "Implemented by"), rows)


def _heard_in_run(target: str, overrides: tuple[str, ...]) -> Iterator[tuple[str, str, str, str]]:
    from miles_core.config.layers import open_catalog
    from miles_core.run.plan import make_plan

    plan = make_plan(target, overrides, open_catalog(target, overrides))
    for role in LIFECYCLE:
        chosen = [one for one in plan.callbacks if role in one.spec.runs_on]
        order = call_order(role, [resolve(one.spec.ref) for one in chosen])
        for hook, places in order.items():
            if places:
                names = ", ".join(f"{chosen[place].plugin}:{chosen[place].spec.name}" for place in places)
                yield hook, role, _since(lifecycle_hooks(role)[hook]), names


def _since(spec: Any) -> str:
    match = re.search(r"\bSince (\d+(\.\d+)*)", spec.__doc__ or "")
    return match[1] if match else "?"


def _declarers(catalog: Catalog, kind: type[Spec]) -> str:
    return ", ".join(sorted({entry.plugin.name for entry in catalog.all(kind)}))


def _callbacks(catalog: Catalog) -> dict[str, object]:
    """ "plugin:callback" -> its class. One that does not load is named on stderr and left out."""
    found = {}
    for entry in catalog.all(CallbackSpec):
        try:
            found[f"{entry.plugin.name}:{entry.spec.name}"] = resolve(entry.spec.ref)
        except PluginError as error:
            click.echo(f"{entry.plugin.name}: {error}", file=sys.stderr)
    return found
