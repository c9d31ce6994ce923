"""The rules that every plugin keeps: `miles plugins check`, and tests of plugins (`miles_core.testing.contract_tests`).

A rule is a function that yields what is wrong, in words; its docstring says what should be. Those here look at a
plugin as a whole; those of `miles_core.testing.kits` try one of its components.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from miles_core.errors import MissingExtraError, PluginError, UserError
from miles_core.lasting import lasting_imports
from miles_core.plugins import CORE, HEAVY, Plugin, one_line, options_of, resolve
from miles_core.specs import CallbackSpec, CommandSpec, ModelSpec, RecipeSpec, Spec
from miles_core.testing.kits import RecordRule, rules_of
from miles_core.testing.subject import SkippedError, Subject
from miles_core.watchdog import TimeLimitError, time_limit

Rule = Callable[[Plugin], Iterable[str]]

OF_KITS = frozenset({"torch", "transformers"})
"""What kits import and core does without."""

LIMIT_S = 120.0
"""Seconds that one rule may take."""

_IMPORT_S = 60


class Later(str):
    """A fault that is none yet: it will be one with a later release of Miles."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a rule. record: "loss grpo" for a rule about a component, "" for one about the plugin.

    faults: what is wrong, in words; warnings: what will be wrong with a later release of Miles; skipped: why it could
    not be tried, "" if it could.
    """

    rule: str
    record: str = ""
    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    skipped: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A rule that is about to be tried on a plugin, or on one of its records."""

    rule: str
    record: str
    faults: Callable[[], Iterable[str]]

    def run(self) -> Verdict:
        """Tries it. Whatever a plugin's code raises is a fault."""
        verdict = partial(Verdict, rule=self.rule, record=self.record)
        try:
            with lasting_imports(), time_limit(LIMIT_S, self.rule.replace("_", " ")):
                found = tuple(self.faults())
            later = tuple(fault for fault in found if isinstance(fault, Later))
            return verdict(faults=tuple(fault for fault in found if fault not in later), warnings=later)
        except (SkippedError, MissingExtraError) as reason:
            return verdict(skipped=str(reason))
        except KeyboardInterrupt:
            raise
        except TimeLimitError as late:
            return verdict(faults=(str(late),))
        except BaseException as error:
            if isinstance(error, ModuleNotFoundError) and error.name in OF_KITS:
                return verdict(skipped=f"{error.name} is not installed")
            return verdict(faults=(_told(error),))


def _told(error: BaseException) -> str:
    """What rules raise on purpose is a sentence; of anything else, the type says more than the message."""
    return str(error) if type(error) in (UserError, PluginError) else one_line(error)


def cases(plugin: Plugin) -> list[Case]:
    """Every rule that applies to the plugin; only the first, `loads`, if it is not active."""
    about_plugin = [Case(rule=rule.__name__, record="", faults=partial(rule, plugin)) for rule in RULES]
    if plugin.status != "active":
        return about_plugin[:1]
    about_records = [
        Case(
            rule=rule.__name__,
            record=f"{record.kind} {record.name}",
            faults=partial(_try, rule, plugin, record),
        )
        for record in plugin.records
        for rule in rules_of(type(record))
    ]
    return [*about_plugin, *about_records]


def check(plugin: Plugin) -> Iterator[Verdict]:
    """Every rule's verdict, as it is reached."""
    return (case.run() for case in cases(plugin))


def _try(rule: RecordRule, plugin: Plugin, record: Spec) -> list[str]:
    with TemporaryDirectory(prefix="miles-check-") as folder:
        return list(rule(Subject(plugin, record, Path(folder))))


# ---- Rules about a plugin as a whole --------------------------------------------------------------------------------


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
    """Its module, and those of options, checks and backends, import no torch, ray, sglang, megatron or transformers."""
    planned = {ref for record in plugin.records for ref in [*_refs(record, "options"), *_planned(record)]}
    modules = sorted({ref.partition(":")[0] for ref in planned})
    code = (
        "import importlib, json, sys\n"
        "sys.path[:] = json.loads(sys.argv[1])\n"
        "for module in sys.argv[2:]: importlib.import_module(module)\n"
        "print(); print(json.dumps(list(sys.modules)))"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path), plugin.entry, *modules]
    try:
        done = subprocess.run(  # noqa: S603 — our own interpreter
            command, capture_output=True, text=True, timeout=_IMPORT_S, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        yield f"importing it takes more than {_IMPORT_S} seconds"
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
    for ref in [*_refs(record, "ref", "receiver", "critic", "flags", "example"), *_planned(record)]:
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


def _refs(record: Spec, *fields: str) -> list[str]:
    """The references in those fields of a record that it has."""
    return [ref for field in fields if (ref := getattr(record, field, None))]


def _planned(record: Spec) -> list[str]:
    """The references beside its options that are called while a run is planned."""
    return [*_refs(record, "check"), *(record.backends.values() if isinstance(record, ModelSpec) else ())]


def _recipe_faults(recipe: RecipeSpec) -> Iterator[str]:
    import tomllib
    from importlib.resources import files

    package, _, path = recipe.ref.partition(":")
    try:
        tomllib.loads((files(package) / path).read_text(encoding="utf-8"))
    except (OSError, ImportError, TypeError, ValueError) as error:  # TypeError: a module, no package
        yield f"{recipe.ref} cannot be read: {one_line(error)}"


def options_fit_run_files(plugin: Plugin) -> Iterator[str]:
    """Options are frozen keyword-only dataclasses that a run file can say; defaults survive, unknown keys do not."""
    for record in plugin.records:
        try:
            options = options_of(record)
        except PluginError as error:
            yield str(error)
            continue
        if options is not None:
            yield from (f"{record.options}: {fault}" for fault in _options_faults(options, record.kind))


def _options_faults(options: type, kind: str) -> Iterator[str]:
    faults = [*_dataclass_faults(options), *_name_faults(options, kind)]
    yield from faults
    if not faults:
        yield from _unknown_key_faults(options)
        yield from _round_trip_faults(options)


def _dataclass_faults(options: Any) -> Iterator[str]:
    if not options.__dataclass_params__.frozen:
        yield f"{options.__name__} is not frozen"
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.init and not field.kw_only:
            yield f"{field.name} is not keyword-only"
        yield from (f"{field.name}: {fault}" for fault in _type_faults(hints[field.name]))


def _name_faults(options: Any, kind: str) -> Iterator[str]:
    """Core's own keys stand beside a component's options in a run file, and come first."""
    from miles_core.config.schema import own_keys

    taken = {"name"} | own_keys(kind) | (own_keys("critic") if kind == "trainer" else set())
    for field in dataclasses.fields(options):
        if field.name in taken:
            yield f"{field.name} is a key of Miles's own there; call it otherwise"


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


def _unknown_key_faults(options: type) -> Iterator[str]:
    from miles_core.config.build import build
    from miles_core.config.source import read_toml

    try:
        build(options, read_toml(f"{_UNKNOWN} = 1", lambda line: f"line {line}"), ())
    except UserError as error:
        if _UNKNOWN in str(error):
            return
    yield f"the key {_UNKNOWN}, which is none of its options, is not refused"


_UNKNOWN = "no-such-option"


def _round_trip_faults(options: type) -> Iterator[str]:
    from miles_core.config.build import build, plain
    from miles_core.config.source import read_toml, toml_text

    defaults = _defaults(options)
    if defaults is None:
        return
    text = toml_text(plain(defaults))
    again: object = build(options, read_toml(text, lambda line: f"line {line}"), ())
    if again != defaults:
        yield f"its defaults {defaults!r} come back from a run file as {again!r}"


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def records_are_the_same_again(plugin: Plugin) -> Iterator[str]:
    """Asked twice, it declares the same: records do not depend on when, where or how often they are asked for."""
    from miles_core.declarations import declarations

    for _ in range(2):
        again = tuple(declarations(importlib.import_module(plugin.entry)))
        if again != plugin.records:
            other = [record for record in again if record not in plugin.records] or plugin.records
            yield f"asked again, it declares something else: {other[0]!r:.100}"
            return


def records_travel(plugin: Plugin) -> Iterator[str]:
    """Records and options survive pickling, because they go to worker processes."""
    import pickle

    for record in plugin.records:
        if pickle.loads(pickle.dumps(record)) != record:  # noqa: S301 — our own bytes
            yield f"{record.kind} {record.name} is another record after pickling"
        try:
            options = options_of(record)
        except PluginError:  # options_fit_run_files says so
            continue
        defaults = _defaults(options) if options else None
        if defaults is not None and pickle.loads(pickle.dumps(defaults)) != defaults:  # noqa: S301 — as above
            yield f"{record.options}: its defaults are others after pickling"


def _defaults(options: type) -> Any:
    """The default options; None if something must be chosen."""
    if any(_required(field) for field in dataclasses.fields(options)):
        return None
    try:
        return options()
    except ValueError:  # something must be chosen, which is as good as a required field
        return None


def names_are_free(plugin: Plugin) -> Iterator[str]:
    """No record takes a name that miles-core has: run files that say it would become ambiguous."""
    from miles_core.declarations import core_names

    for record in plugin.records if plugin.name != CORE else ():
        if (record.kind, record.name) in core_names():
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


def uses_nothing_deprecated(plugin: Plugin) -> Iterator[str]:
    """No hook that it implements, and no argument of one, goes with a later release of Miles."""
    from miles_core import declarations, lifecycle

    found = declarations.deprecations(importlib.import_module(plugin.entry))
    for record in plugin.records:
        if isinstance(record, CallbackSpec):
            callback = resolve(record.ref)
            with contextlib.suppress(UserError):  # of which `callbacks_have_hooks` tells
                lifecycle.check_callback(callback)
                found += lifecycle.deprecations(callback)
    yield from map(Later, dict.fromkeys(found))


RULES: tuple[Rule, ...] = (
    loads,
    declares_something,
    bounds_core,
    imports_lightly,
    references_resolve,
    options_fit_run_files,
    records_are_the_same_again,
    records_travel,
    names_are_free,
    callbacks_have_hooks,
    uses_nothing_deprecated,
)
"""All of them, in the order in which they are checked and shown."""
