"""The rules that every plugin keeps: `miles plugins check`, and tests of plugins.

A rule is a function that yields what is wrong with a plugin, in words; its docstring says what should be. A plugin's
own tests run them all:

    from miles_core.plugins import discover
    from miles_core.testing.checks import check

    def test_the_plugin_keeps_the_rules():
        assert [fault for _, faults in check(discover().plugin("miles-example")) for fault in faults] == []
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from miles_core.errors import PluginError
from miles_core.plugins import CORE, Plugin, one_line, options_of, resolve
from miles_core.specs import CallbackSpec, CommandSpec, RecipeSpec, Spec, WeightSyncSpec

Rule = Callable[[Plugin], Iterable[str]]

HEAVY = frozenset({"megatron", "ray", "sglang", "torch", "transformers"})
"""What a plugin's module and its options modules must not import: every command would wait for it."""

_SECONDS = 60


def check(plugin: Plugin) -> Iterator[tuple[str, list[str]]]:
    """(rule, faults) for every rule; only the first, `loads`, of a plugin that is not active."""
    for rule in RULES:
        faults = _faults(rule, plugin)
        yield rule.__name__, faults
        if rule is loads and faults:
            return


def _faults(rule: Rule, plugin: Plugin) -> list[str]:
    try:
        return list(rule(plugin))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # rules call the plugin's code, which may raise anything
        return [one_line(error)]


def loads(plugin: Plugin) -> Iterator[str]:
    """It is loaded: its module imports and every record keeps its rules."""
    if plugin.status != "active":
        yield f"{plugin.status}: {plugin.reason}"


def declares_something(plugin: Plugin) -> Iterator[str]:
    """It offers at least one record."""
    if not plugin.records:
        yield "it declares nothing; its module needs a hook such as miles_losses, decorated with @hookimpl"


def bounds_core(plugin: Plugin) -> Iterator[str]:
    """Its requirement on miles-core has a lower bound, so that pip never pairs it with a core that lacks a hook."""
    if plugin.name != CORE and not re.search(r"(>=|>|==|~=)\s*\d", plugin.requires):
        yield f"its requirement {CORE}{plugin.requires} has no lower bound"


def imports_lightly(plugin: Plugin) -> Iterator[str]:
    """Its module and its options modules import no torch, ray, sglang, megatron or transformers."""
    options = {record.options.partition(":")[0] for record in plugin.records if record.options}
    code = (
        "import importlib, json, sys\n"
        "sys.path[:] = json.loads(sys.argv[1])\n"
        "for module in sys.argv[2:]: importlib.import_module(module)\n"
        "print(); print(json.dumps(list(sys.modules)))"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path), plugin.entry, *sorted(options)]
    try:
        done = subprocess.run(  # noqa: S603 — our own interpreter
            command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        yield f"importing it takes more than {_SECONDS} seconds"
        return
    if done.returncode:
        yield f"importing it in a fresh process fails: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        return
    heavy = HEAVY & set(json.loads(done.stdout.splitlines()[-1]))
    if heavy:
        yield f"importing it also imports {', '.join(sorted(heavy))}"


def references_resolve(plugin: Plugin) -> Iterator[str]:
    """Every reference leads to something that can be called; a recipe's, to a TOML file."""
    for record in plugin.records:
        for fault in _reference_faults(record):
            yield f"{record.kind} {record.name}: {fault}"


def _reference_faults(record: Spec) -> Iterator[str]:
    if isinstance(record, RecipeSpec):
        yield from _recipe_faults(record)
        return
    refs = [record.ref, record.receiver] if isinstance(record, WeightSyncSpec) else [record.ref]
    for ref in refs:
        try:
            target = resolve(ref)
        except PluginError as error:
            yield str(error)
            continue
        if not callable(target):
            yield f"{ref} is a {type(target).__name__}, which cannot be called"
    if isinstance(record, CommandSpec):
        import click

        if not isinstance(resolve(record.ref), click.Command):
            yield f"{record.ref} is no click.Command"


def _recipe_faults(recipe: RecipeSpec) -> Iterator[str]:
    import tomllib
    from importlib.resources import files

    package, _, path = recipe.ref.partition(":")
    try:
        tomllib.loads((files(package) / path).read_text(encoding="utf-8"))
    except (OSError, ImportError, TypeError, ValueError) as error:  # TypeError: a module, no package
        yield f"{recipe.ref} cannot be read: {one_line(error)}"


def options_fit_run_files(plugin: Plugin) -> Iterator[str]:
    """Options are frozen keyword-only dataclasses of types that a run file can say, and their defaults survive it."""
    for record in plugin.records:
        try:
            options = options_of(record)
        except PluginError as error:
            yield str(error)
            continue
        if options is not None:
            yield from (f"{record.options}: {fault}" for fault in _options_faults(options))


def _options_faults(options: type) -> Iterator[str]:
    faults = [*_dataclass_faults(options)]
    yield from faults
    if not faults:
        yield from _round_trip_faults(options)


def _dataclass_faults(options: Any) -> Iterator[str]:
    if not options.__dataclass_params__.frozen:
        yield f"{options.__name__} is not frozen"
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.init and not field.kw_only:
            yield f"{field.name} is not keyword-only"
        yield from (f"{field.name}: {fault}" for fault in _type_faults(hints[field.name]))


def _type_faults(hint: Any) -> Iterator[str]:
    """What a run file cannot say; the types that `miles_core.config.build` reads are fine."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint in (bool, int, float, str, Any, type(None)) or kind is typing.Literal:
        return
    if kind in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _type_faults(argument)
    elif kind is tuple and len(arguments) == 2 and arguments[1] is ...:
        yield from _type_faults(arguments[0])
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        yield from _dataclass_faults(kind)
    elif not (isinstance(kind, type) and issubclass(kind, Mapping) and kind is not dict):
        yield f"a run file cannot give a {getattr(hint, '__name__', hint)}; use tuple[X, ...] or Mapping[str, X]"


def _round_trip_faults(options: type) -> Iterator[str]:
    import tomli_w

    from miles_core.config.build import build, plain
    from miles_core.config.source import read_toml

    if any(_required(field) for field in dataclasses.fields(options)):
        return
    try:
        defaults = options()
    except ValueError:  # something must be chosen, which is as good as a required field
        return
    text = tomli_w.dumps(_without_unset(plain(defaults)))
    again: object = build(options, read_toml(text, lambda line: f"line {line}"), ())
    if again != defaults:
        yield f"its defaults {defaults!r} come back from a run file as {again!r}"


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _without_unset(value: Any) -> Any:
    """TOML has no null: what is not set is left out."""
    if isinstance(value, dict):
        return {key: _without_unset(item) for key, item in value.items() if item is not None}
    return value


def names_are_free(plugin: Plugin) -> Iterator[str]:
    """No record takes a name that miles-core has: run files that say it would become ambiguous."""
    from miles_core.cli.main import COMMANDS
    from miles_core.declarations import declarations

    core = {(record.kind, record.name) for record in declarations(importlib.import_module("miles_core.builtin"))}
    for record in plugin.records if plugin.name != CORE else ():
        if (record.kind, record.name) in core or (isinstance(record, CommandSpec) and record.name in COMMANDS):
            yield f"{record.kind} {record.name!r} is also miles-core's"


def callbacks_have_hooks(plugin: Plugin) -> Iterator[str]:
    """Every callback implements a hook of each role that it runs on, with arguments that the hook gives."""
    from miles_core.lifecycle import check_callback, lifecycle_hooks

    for record in plugin.records:
        if not isinstance(record, CallbackSpec):
            continue
        callback = resolve(record.ref)
        check_callback(callback)
        for role in sorted(record.runs_on):
            if not any(hasattr(callback, hook) for hook in lifecycle_hooks(role)):
                yield f"callback {record.name} runs on {role} but hears none of its hooks"


RULES: tuple[Rule, ...] = (
    loads,
    declares_something,
    bounds_core,
    imports_lightly,
    references_resolve,
    options_fit_run_files,
    names_are_free,
    callbacks_have_hooks,
)
"""All rules, in the order in which they are checked and shown."""
