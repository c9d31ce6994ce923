"""Plugins: finding them, loading them, looking up what they offer.

A plugin is a distribution with one entry point in the group `miles.plugins`, which names a module that imports nothing
heavy. Whether it is disabled or does not fit this core is decided from its metadata, before its module is imported.
Whatever a plugin raises makes that plugin "failed" and nothing else: commands go on, and a run that needs the plugin
shows its traceback.

Declarations (of modules) and lifecycle hooks (of a run's callbacks) have plugin managers of their own: `discover` and
`load_exact` make the first, `lifecycle` the second.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args, get_type_hints

import pluggy

from miles_core import __version__, specs
from miles_core.errors import PluginError, RunError, UserError, nearest
from miles_core.hooks import DeclarationHooks, DriverHooks, RolloutHooks, TrainerHooks
from miles_core.specs import Spec

if TYPE_CHECKING:
    from importlib.metadata import Distribution
    from types import ModuleType

GROUP = "miles.plugins"
DISABLE_VARIABLE = "MILES_DISABLE_PLUGINS"
CORE = "miles-core"
_CORE_ENTRY = "miles_core.builtin"

Status = Literal["active", "disabled", "incompatible", "failed"]
Role = Literal["driver", "trainer", "rollout"]
S = TypeVar("S", bound=Spec)

LIFECYCLE: Mapping[Role, type] = {"driver": DriverHooks, "trainer": TrainerHooks, "rollout": RolloutHooks}
"""The lifecycle hooks of each process role."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """An installed plugin, loaded or not.

    name: of its distribution, normalised ("miles-grpo"); entry: the module that its entry point names; requires: what
    it asks of miles-core, as text; reason: why it is not active, one line, else ""; traceback: of what it raised;
    records: what it declares, in the order of the hooks and then its own.
    """

    name: str
    version: str
    entry: str
    requires: str
    status: Status
    reason: str = ""
    traceback: str | None = None
    records: tuple[Spec, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[S]):
    """A record and the plugin that declares it."""

    spec: S
    plugin: Plugin


@dataclass(frozen=True)
class Catalog:
    """What all plugins offer. plugins: every one that was found, loaded or not, sorted by name."""

    plugins: tuple[Plugin, ...]

    def all(self, kind: type[S]) -> list[Entry[S]]:
        """The records of one kind from active plugins, sorted by name and then plugin."""
        entries = [
            Entry(spec=record, plugin=plugin)
            for plugin in self.plugins
            for record in plugin.records
            if isinstance(record, kind)
        ]
        return sorted(entries, key=lambda entry: (entry.spec.name, entry.plugin.name))

    def get(self, kind: type[S], name: str) -> Entry[S]:
        """The record called `name`, or "plugin:name" where two plugins offer the same name.

        UserError: nobody offers it (with the nearest names, the known ones, and why other plugins are not loaded), or
        more than one plugin does (with the qualified names).
        """
        entries = self.all(kind)
        plugin, _, bare = name.rpartition(":")
        found = [
            entry
            for entry in entries
            if entry.spec.name == bare and (not plugin or entry.plugin.name == normalised(plugin))
        ]
        if len(found) == 1:
            return found[0]
        if found:
            qualified = " or ".join(repr(f"{entry.plugin.name}:{bare}") for entry in found)
            raise UserError(f"{kind.kind} {name!r} is offered by {len(found)} plugins. Say {qualified}.")
        raise UserError("\n".join(self._unknown(kind.kind, name, entries)))

    def plugin(self, name: str) -> Plugin:
        """The plugin of the distribution `name`. UserError: there is no such plugin."""
        for plugin in self.plugins:
            if plugin.name == normalised(name):
                return plugin
        raise UserError(f"no plugin {name!r} is installed. {nearest(name, [plugin.name for plugin in self.plugins])}")

    def plugin_set(self, names: Iterable[str]) -> tuple[tuple[str, str, str], ...]:
        """(distribution, version, entry point value) of those plugins, sorted: what `load_exact` takes."""
        plugins = {plugin.name: plugin for plugin in map(self.plugin, names)}
        return tuple(sorted((plugin.name, plugin.version, plugin.entry) for plugin in plugins.values()))

    def _unknown(self, noun: str, name: str, entries: list[Entry[S]]) -> Iterator[str]:
        known = {entry.spec.name for entry in entries} | {
            f"{e.plugin.name}:{e.spec.name}" for e in entries if ":" in name
        }
        hint = nearest(name, known)
        yield f"unknown {noun} {name!r}. {hint}"
        if known and not hint.startswith("Known:"):
            yield f"Known: {', '.join(sorted(known))}."
        idle = [plugin for plugin in self.plugins if plugin.status != "active"]
        if idle:
            yield "Plugins that are not loaded:"
        yield from (f"  {plugin.name}: {plugin.status}, {plugin.reason}" for plugin in idle)


def normalised(name: str) -> str:
    """A distribution's name as PyPI compares it: "Miles_GRPO" and "miles-grpo" are the same."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


# ---- Discovery ----------------------------------------------------------------------------------------------------


def discover(*, disable: Iterable[str] = ()) -> Catalog:
    """Finds and loads every installed plugin except the disabled ones.

    disable: distribution names, or "*" for all but miles-core; the environment variable MILES_DISABLE_PLUGINS adds its
    comma-separated names. UserError: miles-core is among them.
    """
    disabled = _disabled(disable)
    plugins = [_load_core()]
    for found in _installed():
        reason = disabled.get(found.name) or disabled.get("*")
        plugins.append(found.plugin("disabled", reason) if reason else _load(found))
    return Catalog(tuple(sorted(plugins, key=lambda plugin: plugin.name)))


def load_exact(plugin_set: Iterable[tuple[str, str, str]]) -> Catalog:
    """Loads exactly the plugins of the driver's `Catalog.plugin_set`, without a scan. For worker processes.

    UserError: one is missing here, or has another version or entry point. RunError: one does not load here.
    """
    plugins = [_load_exactly(*wanted) for wanted in plugin_set]
    return Catalog(tuple(sorted(plugins, key=lambda plugin: plugin.name)))


def _load_exactly(name: str, version: str, entry: str) -> Plugin:
    from importlib.metadata import PackageNotFoundError, distribution

    if name == CORE:
        plugin = _load_core()
    else:
        try:
            plugin = _load(_Found.read(distribution(name)))
        except PackageNotFoundError:
            raise UserError(
                f"plugin {name} {version} is not installed in this process's environment ({sys.executable}), "
                "but the driver of the run uses it. Install the same packages on every node."
            ) from None
    if (plugin.version, plugin.entry) != (version, entry):
        raise UserError(
            f"plugin {name} is {plugin.version} ({plugin.entry}) in this process's environment ({sys.executable}), "
            f"but {version} ({entry}) in the driver's. Install the same packages on every node."
        )
    if plugin.status != "active":
        raise RunError(f"plugin {name} is {plugin.status} in this process: {plugin.reason}", plugin.traceback)
    return plugin


def _disabled(disable: Iterable[str]) -> dict[str, str]:
    """name or "*" -> why it is disabled."""
    reasons = {_disable_key(name): "by the run file" for name in disable}
    variable = os.environ.get(DISABLE_VARIABLE, "").split(",")
    reasons |= {_disable_key(name): f"by -p or {DISABLE_VARIABLE}" for name in variable if name.strip()}
    if CORE in reasons:
        raise UserError(f"{CORE} cannot be disabled ({reasons[CORE]}).")
    return reasons


def _disable_key(name: str) -> str:
    return "*" if name.strip() == "*" else normalised(name)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a distribution's metadata say. fault: why they are of no use, else ""."""

    name: str
    version: str
    entry: str
    requires: str
    markers: tuple[str, ...]
    fault: str = ""

    @classmethod
    def read(cls, distribution: Distribution) -> _Found:
        entries = [point.value for point in distribution.entry_points if point.group == GROUP]
        requirements = [text for text in distribution.requires or () if _requires_core(text)]
        return cls(
            name=normalised(distribution.name),
            version=distribution.version,
            entry=entries[0] if entries else "",
            requires=", ".join(_REQUIREMENT_NAME.sub("", text, count=1).strip() for text in requirements),
            markers=tuple(requirements),
            fault=_entry_fault(entries),
        )

    def plugin(self, status: Status, reason: str = "", **result: Any) -> Plugin:
        return Plugin(
            name=self.name,
            version=self.version,
            entry=self.entry,
            requires=self.requires,
            status=status,
            reason=reason,
            **result,
        )


_REQUIREMENT_NAME = re.compile(r"\s*[A-Za-z0-9][A-Za-z0-9._-]*\s*")


def _requires_core(requirement: str) -> bool:
    match = _REQUIREMENT_NAME.match(requirement)
    return match is not None and normalised(match.group()) == CORE


def _entry_fault(entries: list[str]) -> str:
    if len(entries) != 1:
        return f"has {len(entries)} entry points in the group {GROUP}; a plugin has one"
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", entries[0]):
        return f"its entry point {entries[0]!r} does not name a module"
    return ""


def _installed() -> Iterator[_Found]:
    """Every distribution with an entry point in our group, but core.

    Reads the small entry_points.txt of each distribution and the metadata of plugins only; the first of a name on
    sys.path is the one that imports see, so it is the only one that counts.
    """
    from importlib.metadata import distribution, distributions

    seen = {CORE}
    for candidate in distributions():
        name = ""
        try:
            if GROUP not in (candidate.read_text("entry_points.txt") or ""):
                continue
            name = normalised(candidate.name)
            if name in seen:
                continue
            seen.add(name)
            first = distribution(name)
            if GROUP in (first.read_text("entry_points.txt") or ""):
                yield _Found.read(first)
        except Exception as error:  # whatever is wrong with its metadata, the others go on
            fault = f"its metadata cannot be read: {_first_line(error)}"
            yield _Found(name=name or "unknown", version="", entry="", requires="", markers=(), fault=fault)


def _load_core() -> Plugin:
    found = _Found(name=CORE, version=__version__, entry=_CORE_ENTRY, requires="", markers=())
    return _import(found)


def _load(found: _Found) -> Plugin:
    """Checks the metadata, then imports the module and collects its records."""
    if found.fault:
        return found.plugin("failed", found.fault)
    unfit = _unfit(found.markers)
    return found.plugin("incompatible", unfit) if unfit else _import(found)


def _unfit(requirements: Iterable[str]) -> str:
    """Why this core does not satisfy a plugin's requirements on it, "" if it does."""
    from packaging.requirements import InvalidRequirement, Requirement

    applying = []
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            return f"its requirement {text!r} cannot be understood"
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            applying.append(requirement)
    if not applying:
        return f"does not say which {CORE} it needs; its dependencies lack {CORE}>={__version__}"
    for requirement in applying:
        if not requirement.specifier.contains(__version__, prereleases=True):
            return f"needs {CORE} {requirement.specifier}, found {__version__}"
    return ""


# ---- Loading one plugin -------------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """A plugin breaks a rule; the message says which, and no traceback would say more."""


def _import(found: _Found) -> Plugin:
    try:
        module = importlib.import_module(found.entry)
        return found.plugin("active", records=tuple(_declarations(module)))
    except KeyboardInterrupt:
        raise
    except _RefusedError as error:
        return found.plugin("failed", str(error))
    except BaseException as error:  # SystemExit and the like too: nothing that a plugin raises ends the process
        return found.plugin("failed", _one_line(error), traceback=_plugin_traceback(error))


def _declarations(module: ModuleType) -> Iterator[Spec]:
    """The records of one module, checked. It gets a manager to itself, so provenance needs no bookkeeping."""
    manager = pluggy.PluginManager("miles")
    manager.add_hookspecs(DeclarationHooks)
    _check_module(manager, module)
    manager.register(module)
    seen: set[tuple[str, str]] = set()
    for hook, kind in declaration_kinds().items():
        caller = getattr(manager.hook, hook)
        if not caller.get_hookimpls():
            continue
        answers = caller()
        if not answers:
            raise _RefusedError(f"{hook} returned None instead of {kind.__name__} records")
        for record in answers[0]:
            if not isinstance(record, kind):
                raise _RefusedError(f"{hook} gave {_type_name(record)} {record!r:.80}, which is no {kind.__name__}")
            if (kind.kind, record.name) in seen:
                raise _RefusedError(f"{hook} gave the {kind.kind} {record.name!r} twice")
            seen.add((kind.kind, record.name))
            yield record


@cache
def declaration_kinds() -> dict[str, type[Spec]]:
    """Declaration hook -> the type of its records, in the order of `DeclarationHooks`."""
    kinds = {}
    for hook, function in vars(DeclarationHooks).items():
        if hook.startswith("miles_"):
            returns = get_type_hints(function, localns={"specs": specs})["return"]
            kinds[hook] = get_args(returns)[0]
    return kinds


def lifecycle_hooks(role: Role) -> dict[str, Any]:
    """Lifecycle hook -> its specification, for one role."""
    return {name: item for name, item in vars(LIFECYCLE[role]).items() if not name.startswith("_")}


def _roles_of(hook: str) -> list[str]:
    return [role for role in LIFECYCLE if hook in lifecycle_hooks(role)]


def _check_module(manager: pluggy.PluginManager, module: ModuleType) -> None:
    """Refuses what is no declaration: pluggy itself would pass over it in silence."""
    for name, item in list(vars(module).items()):
        own = inspect.isfunction(item) and item.__module__ == module.__name__
        decorated = manager.parse_hookimpl_opts(module, name)
        if not own and decorated is None:
            continue
        if roles := _roles_of(name):
            raise _RefusedError(
                f"{name} is a hook of the {roles[0]}'s callbacks; a module cannot implement it, "
                "only the class of a CallbackSpec can"
            )
        if name in declaration_kinds():
            _check_declaration(name, item, decorated)
        elif decorated is not None:
            raise _RefusedError(f"{name} is not a hook of Miles. {nearest(name, declaration_kinds())}")


def _check_declaration(name: str, function: Any, decorated: Mapping[str, Any] | None) -> None:
    if decorated is None:
        raise _RefusedError(f"{name} lacks its @hookimpl")
    if decorated.get("wrapper") or decorated.get("hookwrapper"):
        raise _RefusedError(f"{name} is a wrapper; a declaration cannot wrap those of others")
    if inspect.signature(function).parameters:
        raise _RefusedError(f"{name} takes arguments; it is called with none")


def _type_name(value: object) -> str:
    return "an" if value is None else f"a {type(value).__name__},"


def _first_line(error: BaseException) -> str:
    try:
        return next(iter(str(error).splitlines()), "")
    except Exception:
        return "(its message cannot be read)"


def _one_line(error: BaseException) -> str:
    line = _first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _plugin_traceback(error: BaseException) -> str:
    """The traceback without the frames of this module and of the import system above the plugin's own."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_FOREIGN_FRAMES):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


_FOREIGN_FRAMES = (__file__, str(importlib.__file__), "<frozen importlib", str(pluggy.__path__[0]))


# ---- References ---------------------------------------------------------------------------------------------------


def resolve(ref: str) -> Any:
    """Imports "module:attribute" (the attribute may be dotted).

    PluginError: it does not import or has no such attribute; `__cause__` is what was raised, with its traceback.
    """
    module, _, attribute = ref.partition(":")
    try:
        target: Any = importlib.import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin's module may raise anything, SystemExit too
        raise PluginError(f"{ref} cannot be loaded: {_one_line(error)}") from error
    return target


def options_of(spec: Spec) -> type | None:
    """The options dataclass of a record, imported; None if there is nothing to set.

    PluginError: it does not import, or is no dataclass.
    """
    if spec.options is None:
        return None
    options = resolve(spec.options)
    if not (isinstance(options, type) and is_dataclass(options)):
        raise PluginError(f"{spec.options}, the options of {spec.kind} {spec.name!r}, is no dataclass")
    return options


# ---- Lifecycle hooks ----------------------------------------------------------------------------------------------


class _Lifecycle(pluggy.PluginManager):
    """The manager of one role: every method that has the name of one of its hooks implements it, decorated or not."""

    def __init__(self, role: Role) -> None:
        super().__init__("miles")
        self.hooks = lifecycle_hooks(role)
        self.add_hookspecs(LIFECYCLE[role])

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        if name not in self.hooks:
            return None
        return super().parse_hookimpl_opts(plugin, name) or _PLAIN


_PLAIN: Mapping[str, Any] = {
    "wrapper": False,
    "hookwrapper": False,
    "optionalhook": False,
    "tryfirst": False,
    "trylast": False,
    "specname": None,
}


def lifecycle(role: Role, objects: Iterable[object]) -> Any:
    """The hooks of one process role, calling the given callbacks in the given order: `lifecycle(...).step_end(...)`.

    Methods need no decorator; `hookimpl` on one sets pluggy's options. Methods for other roles are passed over.
    UserError: a callback has no lifecycle hook at all, or one that could not be called.
    """
    manager = _Lifecycle(role)
    for item in reversed(list(objects)):  # pluggy calls what was registered last first
        check_callback(type(item))
        manager.register(item)
    return manager.hook


def check_callback(callback: type) -> None:
    """UserError: no lifecycle hook at all, a decorated method that is none, or one that cannot be called."""
    known = {name: function for role in LIFECYCLE for name, function in lifecycle_hooks(role).items()}
    marked = pluggy.PluginManager("miles")
    methods = {name: inspect.getattr_static(callback, name) for name in dir(callback) if not name.startswith("__")}
    for name in methods:
        if name not in known and marked.parse_hookimpl_opts(callback, name) is not None:
            raise UserError(f"{_label(callback)}.{name} is not a lifecycle hook. {nearest(name, known)}")
    heard = [name for name in methods if name in known]
    if not heard:
        raise UserError(
            f"{_label(callback)} has no method that is a lifecycle hook. Its methods: "
            f"{', '.join(name for name in methods if not name.startswith('_')) or 'none'}. Hooks: {', '.join(known)}."
        )
    for name in heard:
        options = marked.parse_hookimpl_opts(callback, name) or _PLAIN
        _check_method(f"{_label(callback)}.{name}", methods[name], known[name], options)


def _label(callback: type) -> str:
    return f"{callback.__module__}:{callback.__qualname__}"


def _check_method(label: str, method: Any, spec: Any, options: Mapping[str, Any]) -> None:
    """pluggy passes arguments by position of their names: none that has a default, none after a star."""
    function = getattr(method, "__func__", method)
    if not inspect.isfunction(function):
        raise UserError(f"{label} must be a method, and is {type(function).__name__}")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"{label} is async; lifecycle hooks are called, not awaited")
    if inspect.isgeneratorfunction(function) and not (options["wrapper"] or options["hookwrapper"]):
        raise UserError(f"{label} yields, so its body would never run; only @hookimpl(wrapper=True) may")
    given = list(inspect.signature(spec).parameters)[1:]
    takes = list(inspect.signature(function).parameters.values())
    for parameter in takes[0 if isinstance(method, staticmethod) else 1 :]:
        if parameter.name not in given:
            raise UserError(f"{label} takes {parameter.name!r}; the hook gives {', '.join(given)}")
        if parameter.default is not parameter.empty or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise UserError(f"{label}: {parameter.name!r} must be a plain argument without a default")
