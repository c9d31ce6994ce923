"""Plugins: finding them, loading them, looking up what they offer.

A plugin is a distribution with one entry point in the group `miles.plugins`, which names a module that imports nothing
heavy. Whether it is disabled or does not fit this core is decided from its metadata, before its module is imported.
Whatever a plugin raises makes that plugin "failed" and nothing else: commands go on, and a run that needs the plugin
shows its traceback. So does a module that takes longer to import than `IMPORT_LIMIT_S`.

Declarations (of modules) and lifecycle hooks (of a run's callbacks) have plugin managers of their own: `discover` and
`load_exact` make the first, `lifecycle` the second.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, is_dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import pluggy

from miles_core import __version__
from miles_core.declarations import RefusedError, declarations
from miles_core.declarations import __file__ as declarations_file
from miles_core.errors import PluginError, RunError, UserError, close, nearest
from miles_core.lifecycle import Role, lifecycle
from miles_core.specs import Spec
from miles_core.watchdog import TimeLimitError, time_limit

if TYPE_CHECKING:
    from importlib.metadata import Distribution

__all__ = [
    "CORE",
    "DISABLE_VARIABLE",
    "GROUP",
    "HEAVY",
    "IMPORT_LIMIT_S",
    "Catalog",
    "Entry",
    "Plugin",
    "Role",
    "Status",
    "disable",
    "discover",
    "leads_nowhere",
    "lifecycle",
    "load_exact",
    "normalised",
    "one_line",
    "options_of",
    "plugin_traceback",
    "resolve",
]

GROUP = "miles.plugins"
DISABLE_VARIABLE = "MILES_DISABLE_PLUGINS"
HEAVY = frozenset({"megatron", "ray", "sglang", "torch", "transformers"})
"""What a plugin's module and its options modules must not import: every command would wait for it."""
IMPORT_LIMIT_S = 10.0
"""Seconds that a plugin's module may take to import, in a process's main thread; see `miles_core.watchdog`."""
CORE = "miles-core"
_CORE_ENTRY = "miles_core.builtin"

Status = Literal["active", "disabled", "incompatible", "failed"]
S = TypeVar("S", bound=Spec)


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """An installed plugin, loaded or not.

    name: of its distribution, normalised ("miles-grpo"); entry: the module that its entry point names; requires: what
    it asks of miles-core, as text; reason: why it is not active, one line, else ""; traceback: of what it raised;
    records: what it declares, in the order of the hooks and then its own; heavy: what of `HEAVY` its module imports.
    """

    name: str
    version: str
    entry: str
    requires: str
    status: Status
    reason: str = ""
    traceback: str | None = None
    records: tuple[Spec, ...] = ()
    heavy: tuple[str, ...] = ()


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
        more than one plugin does (with the qualified names). PluginError: a plugin that failed must have offered it, or
        may have; its traceback goes with the error.
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
        message = "\n".join(self._unknown(kind.kind, name, entries))
        failed = self._suspects(name, {entry.spec.name for entry in entries})
        if failed:
            raise PluginError(message, "\n".join(f"{plugin.name}: {plugin.traceback}" for plugin in failed))
        raise UserError(message)

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

    def not_loaded(self) -> list[str]:
        """Lines for messages about unknown names: each plugin that is not active, with its reason; none if all are."""
        idle = [plugin for plugin in self.plugins if plugin.status != "active"]
        lines = [f"  {plugin.name}: {plugin.status}, {plugin.reason}" for plugin in idle]
        return ["Plugins that are not loaded:", *lines] if lines else []

    def _suspects(self, name: str, known: Iterable[str]) -> list[Plugin]:
        """The failed plugins that an unknown name may have come from: the one that it names; else, unless the name
        looks like a slip of the pen, all of them."""
        plugin, _, bare = name.rpartition(":")
        failed = [found for found in self.plugins if found.status == "failed" and found.traceback]
        if plugin:
            return [found for found in failed if found.name == normalised(plugin)]
        return [] if close(bare, known) else failed

    def _unknown(self, noun: str, name: str, entries: list[Entry[S]]) -> Iterator[str]:
        qualified = ":" in name
        known = {f"{entry.plugin.name}:{entry.spec.name}" if qualified else entry.spec.name for entry in entries}
        hint = nearest(name, known)
        yield f"unknown {noun} {name!r}. {hint}"
        if known and not hint.startswith("Known:"):
            yield f"Known: {', '.join(sorted(known))}."
        yield from self.not_loaded()


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
    plugins = [_load(_CORE_FOUND)]
    for found in sorted(_installed(), key=lambda found: found.name):
        reason = disabled.get(found.name) or disabled.get("*")
        plugins.append(found.plugin("disabled", reason) if reason else _load(found))
    return Catalog(tuple(sorted(plugins, key=lambda plugin: plugin.name)))


def disable(names: Iterable[str]) -> None:
    """From now on, `discover` leaves these out, in this process and in those that it starts."""
    os.environ[DISABLE_VARIABLE] = ",".join(filter(None, [os.environ.get(DISABLE_VARIABLE), *names]))


def load_exact(plugin_set: Iterable[tuple[str, str, str]]) -> Catalog:
    """Loads exactly the plugins of the driver's `Catalog.plugin_set`, without a scan. For worker processes.

    UserError: one is missing here, or has another version or entry point. RunError: one does not load here.
    """
    plugins = [_load_exactly(*wanted) for wanted in plugin_set]
    return Catalog(tuple(sorted(plugins, key=lambda plugin: plugin.name)))


def _load_exactly(name: str, version: str, entry: str) -> Plugin:
    found = _CORE_FOUND if name == CORE else _find(name)
    here = f"in this process's environment ({sys.executable})"
    mend = "Install the same packages on every node."
    if found is None:
        raise UserError(f"plugin {name} {version}, which the driver uses, is not installed {here}. {mend}")
    if (found.version, found.entry) != (version, entry):
        raise UserError(
            f"plugin {name} is {found.version} ({found.entry}) {here}, but {version} ({entry}) in the driver's. {mend}"
        )
    plugin = _load(found)
    if plugin.status != "active":
        raise RunError(f"plugin {name} is {plugin.status} {here}: {plugin.reason}", plugin.traceback)
    return plugin


def _find(name: str) -> _Found | None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return _Found.read(distribution(name))
    except PackageNotFoundError:
        return None


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
    requirements: tuple[str, ...]
    fault: str = ""

    @classmethod
    def read(cls, distribution: Distribution) -> _Found:
        entries = [point.value for point in distribution.entry_points if point.group == GROUP]
        metadata = distribution.metadata  # parsed anew at every access
        for field in ("Name", "Version"):
            if field not in metadata:
                raise ValueError(f"it has no {field}")
        dependencies = metadata.get_all("Requires-Dist") or distribution.requires or ()  # the latter reads egg-info too
        requirements = [text for text in dependencies if _requires_core(text)]
        return cls(
            name=normalised(metadata["Name"]),
            version=metadata["Version"],
            entry=entries[0] if entries else "",
            requires=", ".join(_REQUIREMENT_NAME.sub("", text, count=1).strip() for text in requirements),
            requirements=tuple(requirements),
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
        entry = _first_entry(candidate)
        if not entry:
            continue
        name = normalised(entry.partition(".")[0])  # until its metadata say what it is called
        try:
            name = normalised(candidate.name)
            if name not in seen and _first_entry(first := distribution(name)):
                yield _Found.read(first)
        except Exception as error:  # whatever is wrong with its metadata, the others go on
            fault = f"its metadata cannot be read ({one_line(error)}); install it again"
            yield _Found(name=name, version="", entry=entry, requires="", requirements=(), fault=fault)
        seen.add(name)


def _first_entry(distribution: Distribution) -> str:
    """The module of its first entry point in our group, "" if it has none; much faster than a full parse."""
    try:
        text = distribution.read_text("entry_points.txt") or ""
    except ValueError:  # not UTF-8
        return ""
    match = _OUR_SECTION.search(text)
    return match[1] if match else ""


_OUR_SECTION = re.compile(rf"^\s*\[\s*{re.escape(GROUP)}\s*\][^\[=]*=\s*([^\s\[]+)", re.MULTILINE)


_CORE_FOUND = _Found(name=CORE, version=__version__, entry=_CORE_ENTRY, requires="", requirements=())
"""Core as a plugin: there without metadata too, and not asked whether it fits itself."""


def _load(found: _Found) -> Plugin:
    """Checks the metadata, then imports the module and collects its records."""
    if found.fault:
        return found.plugin("failed", found.fault)
    unfit = "" if found.name == CORE else _unfit(found.requirements)
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


def _import(found: _Found) -> Plugin:
    before = HEAVY & sys.modules.keys()
    try:
        # What a plugin prints must not get into `--json`.
        with redirect_stdout(sys.stderr), time_limit(IMPORT_LIMIT_S, f"importing {found.entry}"):
            records = tuple(declarations(importlib.import_module(found.entry)))
        return found.plugin("active", records=records, heavy=tuple(sorted(HEAVY & sys.modules.keys() - before)))
    except KeyboardInterrupt:
        raise
    except RefusedError as error:
        return found.plugin("failed", str(error))
    except TimeLimitError as late:
        return found.plugin("failed", str(late), traceback=plugin_traceback(late))
    except BaseException as error:  # SystemExit and the like too: nothing that a plugin raises ends the process
        return found.plugin("failed", one_line(error), traceback=plugin_traceback(error))


def _first_line(error: BaseException) -> str:
    try:
        return next(iter(str(error).splitlines()), "")
    except Exception:
        return "(its message cannot be read)"


def one_line(error: BaseException) -> str:
    """An error as a table has room for it: its type and the first line of its message."""
    line = _first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def plugin_traceback(error: BaseException) -> str:
    """The traceback without the frames of this module and of the import system above the plugin's own."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_FOREIGN_FRAMES):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


_FOREIGN_FRAMES = (__file__, declarations_file, str(importlib.__file__), "<frozen importlib", str(pluggy.__path__[0]))


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
        raise PluginError(f"{ref} cannot be loaded: {one_line(error)}") from error
    return target


def leads_nowhere(ref: str) -> bool:
    """Whether "module:attribute" is certain not to resolve: there is no such module, or its source never says the
    attribute's name. Imports nothing, so it can be asked of every reference at once."""
    module, _, attribute = ref.partition(":")
    first = attribute.partition(".")[0]
    if (loaded := sys.modules.get(module)) is not None:
        return not hasattr(loaded, first)
    spec = _find_module(module)
    if spec is None:
        return True
    if spec.origin is None or not spec.origin.endswith(".py"):
        return False
    return first not in Path(spec.origin).read_text(encoding="utf-8", errors="replace")


def _find_module(name: str) -> ModuleSpec | None:
    """The module's spec. `importlib.util.find_spec` would import the packages that it lies in."""
    package, _, _ = name.rpartition(".")
    if not package:
        return find_spec(name)
    path: Iterable[str] | None = None
    if (loaded := sys.modules.get(package)) is not None:
        path = getattr(loaded, "__path__", None)
    elif (parent := _find_module(package)) is not None:
        path = parent.submodule_search_locations
    return None if path is None else PathFinder.find_spec(name, list(path))


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
