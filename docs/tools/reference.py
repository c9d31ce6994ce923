"""The reference, made of what is installed: hooks, records, interfaces, run file, commands, components, rules.

A page asks for a part of it by a line `<!-- generated: NAME ARGUMENT -->`; `PARTS` has the names. Nothing here is a
copy that could grow stale: a new hook, option or component is in the next build.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import posixpath
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from wording import code, description, introduction, own_docstring, prose, signature, table

from miles_core import roles, sample, specs
from miles_core.cli.main import cli
from miles_core.config import schema
from miles_core.config.build import describe, plain
from miles_core.config.source import shown
from miles_core.declarations import declaration_kinds
from miles_core.hooks import DeclarationHooks
from miles_core.lifecycle import LIFECYCLE, lifecycle_hooks
from miles_core.plugins import Catalog, Entry, Plugin, discover, options_of, resolve
from miles_core.run.plan import RUN_KEYS, STAGE_KEYS
from miles_core.specs import CallbackSpec, CommandSpec, RecipeSpec, Spec

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "hooks"
REFERENCE = "reference"
"""Where all of this goes, below docs/."""


@cache
def catalog() -> Catalog:
    """The plugins of this repository; whatever else is installed here is left out."""
    members = {path.parent.name for path in ROOT.glob("miles-*/**/pyproject.toml")}
    return Catalog(tuple(plugin for plugin in discover().plugins if plugin.name in members))


# ---- Links ----------------------------------------------------------------------------------------------------------


def _public(module: ModuleType) -> dict[str, type]:
    """The classes that a module defines, in the order of its source."""
    return {
        name: item
        for name, item in vars(module).items()
        if inspect.isclass(item) and item.__module__ == module.__name__ and not name.startswith("_")
    }


@cache
def _targets() -> dict[str, str]:
    """What may stand in code quotes in a docstring -> the page that explains it."""
    found = {
        "miles_core.run.weights": "algorithms.md#aggregation",
        "miles_core.run.objective": "algorithms.md#corrections",
        "miles_grpo.kl": "algorithms.md#kl-to-the-reference-and-entropy",
        "miles plugins check": "cli.md#miles-plugins-check",
    }
    for page, module in (("records.md", specs), ("interfaces.md", roles), ("interfaces.md", sample)):
        for name in (*_public(module), *(alias for alias, _, _ in _aliases(module))):
            found[name] = found[f"{module.__name__.rpartition('.')[2]}.{name}"] = f"{page}#{name.lower()}"
    found |= {hook: f"declaration-hooks.md#{hook}" for hook in declaration_kinds()}
    found |= {hook: f"lifecycle-hooks.md#{hook}" for role in LIFECYCLE for hook in lifecycle_hooks(role)}
    return found


def linked(text: str, folder: str = REFERENCE) -> str:
    """Markdown whose code quotes lead to what they name. folder: of the page that it is for, below docs/."""

    def link(match: re.Match[str]) -> str:
        target = _targets().get(match[1])
        if target is None:
            return match[0]
        return f"[{match[0]}]({posixpath.relpath(posixpath.join(REFERENCE, target), folder)})"

    return re.sub(r"(?<!\[)`([\w. -]+)`(?!\])", link, text)


def _anchor(record: Spec) -> str:
    return f"{record.kind}-{record.name}".replace(" ", "-").replace("+", "plus").replace(".", "-")


def _component(entry: Entry[Any], folder: str = REFERENCE) -> str:
    page = f"{REFERENCE}/plugins/{entry.plugin.name}.md"
    return f"[`{entry.spec.name}`]({posixpath.relpath(page, folder)}#{_anchor(entry.spec)})"


def _plugins_link(plugins: Iterable[str]) -> str:
    return ", ".join(f"[{name}](plugins/{name}.md)" for name in sorted(plugins)) or "no plugin of this repository"


# ---- Hooks ----------------------------------------------------------------------------------------------------------


def declaration_hooks(_: str = "") -> str:
    """Every declaration hook with its signature, who implements it, and its example."""
    return "\n".join(
        _hook(hook, vars(DeclarationHooks)[hook], f"Declared by {_plugins_link(_declarers(kind))}.", 2)
        for hook, kind in declaration_kinds().items()
    )


def _declarers(kind: type[Spec]) -> set[str]:
    return {entry.plugin.name for entry in catalog().all(kind)}


def lifecycle_hooks_of(role: str) -> str:
    """Every lifecycle hook of a process role."""
    hooks = {name: hook for known in LIFECYCLE if known == role for name, hook in lifecycle_hooks(known).items()}
    return "\n".join(_hook(hook, function, f"Heard by {_listeners(hook)}.", 3) for hook, function in hooks.items())


def _listeners(hook: str) -> str:
    found = [entry for entry in catalog().all(CallbackSpec) if hasattr(resolve(entry.spec.ref), hook)]
    return ", ".join(map(_component, found)) or "no callback of this repository"


def _hook(name: str, function: Any, remark: str, level: int) -> str:
    parts = [f"{'#' * level} {name}\n", code(signature(function)), linked(prose(function.__doc__)), f"{remark}\n"]
    return "\n".join([*parts, *_example(name)])


def _example(hook: str) -> Iterator[str]:
    """The files of a hook's example; tests load it as a plugin and use it."""
    yield from _files(EXAMPLES / hook)


_LANGUAGES = {".jsonl": "json", ".py": "python", ".toml": "toml"}


def _files(folder: Path) -> Iterator[str]:
    """The text of each file below a folder, under its name."""
    for file in sorted(path for path in folder.rglob("*") if path.suffix in _LANGUAGES):
        title = file.relative_to(folder).as_posix()
        yield code(file.read_text(encoding="utf-8"), _LANGUAGES[file.suffix], title)


def package_files(folder: Path) -> str:
    """What an example that is a package has, below its README."""
    return "\n".join(["", "## Its files", "", *_files(folder)])


# ---- Records and interfaces -----------------------------------------------------------------------------------------


def records(_: str = "") -> str:
    """Every record with its fields, and what else their module defines."""
    found = {name: _dataclass(cls) for name, cls in _public(specs).items()}
    found |= {name: _alias(name, value, text) for name, value, text in _aliases(specs)}
    return "\n".join(f"## {name}\n\n{text}" for name, text in found.items())


def interfaces(name: str) -> str:
    """What a module defines: "roles" or "sample"."""
    module = {"roles": roles, "sample": sample}[name]
    found = {alias: _alias(alias, value, text) for alias, value, text in _aliases(module)}
    found |= {name: _interface(cls) for name, cls in _public(module).items()}
    return "\n".join(f"### {name}\n\n{text}" for name, text in found.items())


def _aliases(module: ModuleType) -> list[tuple[str, str, str]]:
    """(name, value, docstring) of a module's documented constants."""
    body = ast.parse(inspect.getsource(module)).body
    return [
        (node.targets[0].id, ast.unparse(node.value), after.value.value)
        for node, after in pairwise(body)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and not node.targets[0].id.startswith("_")
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    ]


def _alias(name: str, value: str, text: str) -> str:
    return f"{code(f'{name} = {value}')}\n{linked(prose(text))}"


def _interface(cls: Any) -> str:
    if dataclasses.is_dataclass(cls):
        return _dataclass(cls) + _methods(cls)
    attributes = [f"    {name}: {value}" for name, value in vars(cls).get("__annotations__", {}).items()]
    head = code("\n".join([f"class {cls.__name__}(Protocol):", *attributes])) if attributes else ""
    return f"{linked(prose(own_docstring(cls)))}\n{head}\n{_methods(cls)}"


def _methods(cls: Any) -> str:
    """The methods and properties that are written out in a class, with their docstrings."""
    texts = []
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for name, item in vars(cls).items():
        function = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
        if (name.startswith("_") and name != "__call__") or name in fields or not inspect.isfunction(function):
            continue
        if _is_written(cls, function):
            mark = "@property\n" if isinstance(item, property) else ""
            texts.append(f"{mark}{signature(function)}{_quoted(function.__doc__ or '')}")
    return code("\n\n".join(texts)) if texts else ""


def _is_written(cls: type, function: Any) -> bool:
    """Not made by `dataclass` or `Protocol`."""
    return bool(function.__code__.co_filename == inspect.getsourcefile(cls))


def _quoted(docstring: str) -> str:
    return "".join(f"\n    # {line}".rstrip() for line in inspect.cleandoc(docstring).splitlines())


def _dataclass(cls: Any) -> str:
    rows = [
        (f"`{field.name}`", f"`{_annotation(field)}`", _default(field), linked(prose(description(cls, field.name))))
        for field in dataclasses.fields(cls)
    ]
    text = linked(prose(introduction(cls)))
    return f"{text}\n{table(('Field', 'Type', 'Default', 'Meaning'), rows)}\n"


def _annotation(field: dataclasses.Field[Any]) -> str:
    return field.type if isinstance(field.type, str) else str(inspect.formatannotation(field.type))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_literal(field.default)}`"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return f"`{_literal(made)}`" if isinstance(made, (dict, tuple)) else "made anew"
    return "required"


def _literal(value: Any) -> str:
    """As source code would say it; sets in order."""
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(repr, value)))}}}" if value else "frozenset()"
    return repr(value) if not callable(value) else "identity"


# ---- Run file -------------------------------------------------------------------------------------------------------

_KINDS = {"data": "data source", "filters": "filter", "corrections": "correction", "callbacks": "callback"}
_KINDS |= {"trackers": "tracker"}
"""Keys that are not named like the kind of component that they choose."""


def run_file(which: str) -> str:
    """The sections of a run file: those of the "run", or those that each of its "stages" may set."""
    keys = {"run": RUN_KEYS, "stages": STAGE_KEYS}[which]
    return "\n".join(_section(key) for key in keys if key not in _BY_HAND)


_BY_HAND = frozenset({"name", "folder", "seed", "stages"})
"""Keys that are no section; the page itself describes them."""


@cache
def sections() -> Mapping[str, type]:
    """Key -> the dataclass of what core itself has in that section, which begins its docstring with "`[key]`"."""
    found = {
        key[1]: cls
        for cls in vars(schema).values()
        if dataclasses.is_dataclass(cls) and isinstance(cls, type)
        if (key := re.match(r"`\[(\w+)\]`", own_docstring(cls)))
    }
    return {**found, "sampling": sample.Sampling}


def kind_of(key: str) -> type[Spec] | None:
    """The kind of component that a key of a run file chooses, if it chooses one."""
    name = _KINDS.get(key, key)
    return next((kind for kind in declaration_kinds().values() if kind.kind == name), None)


def _section(key: str) -> str:
    cls, kind = sections().get(key), kind_of(key)
    parts = [f"### {key}\n"]
    if key == "model":
        kind = None  # a family is not chosen by `name`
    if cls is None and kind is None:
        raise ValueError(f"the reference does not know what the key {key!r} of a run file is")
    if cls is None:
        assert kind is not None
        parts.append(f"{_hook_text(kind)} Takes {_a(kind)} by name, with its options beside.\n")
    else:
        parts += [linked(prose(introduction(cls))), _options_table(cls)]
    if kind is not None:
        parts.append(f"{_plural(kind)}: {', '.join(map(_component, catalog().all(kind))) or 'none installed'}.\n")
    return "\n".join(parts)


def _a(kind: type[Spec]) -> str:
    return f"{'an' if kind.kind[0] in 'aeiou' else 'a'} {kind.kind}"


def _plural(kind: type[Spec]) -> str:
    return f"{kind.kind.capitalize()}{'es' if kind.kind.endswith('s') else 's'}"


def _hook_text(kind: type[Spec]) -> str:
    """What a kind is, in the words of its hook: "Losses: the per-token objective."."""
    hook = next(hook for hook, found in declaration_kinds().items() if found is kind)
    text = " ".join(inspect.cleandoc(vars(DeclarationHooks)[hook].__doc__).split())
    return re.sub(r" Since [\d.]+", "", text)


# ---- Options --------------------------------------------------------------------------------------------------------


def options(cls: type) -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, type, default, meaning) of every option; nested dataclasses are opened."""
    return _options(cls, dataclasses.MISSING, "")


def _options(cls: Any, given: Any, prefix: str) -> Iterator[tuple[str, Any, Any, str]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = _default_of(field) if given is dataclasses.MISSING else getattr(given, field.name)
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _options(hint, default, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hint, default, description(cls, field.name)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _options_table(cls: type, folder: str = REFERENCE) -> str:
    rows = [
        (
            f"`{name}`",
            describe(hint).replace("<", "\\<"),
            "required" if default is dataclasses.MISSING else f"`{shown(plain(default))}`",
            linked(prose(meaning), folder),
        )
        for name, hint, default, meaning in options(cls)
    ]
    return table(("Option", "Is", "Default", "Meaning"), rows) if rows else ""


# ---- Commands -------------------------------------------------------------------------------------------------------


WIDTH = 88
"""Characters of a line of help."""


def command_help(path: str) -> str:
    """What `miles PATH --help` prints."""
    command, context = _command(path.split())
    words = " ".join(["miles", *path.split()])
    return code(f"$ {words} --help\n{command.get_help(context)}", "console")


def _command(path: list[str]) -> tuple[click.Command, click.Context]:
    command: click.Command = cli
    context = click.Context(command, info_name="miles", terminal_width=WIDTH, **cli.context_settings)
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(context, name)
        assert found is not None, f"there is no command miles {' '.join(path)}"
        command = found
        context = click.Context(command, info_name=name, parent=context)
    return command, context


# ---- Rules ----------------------------------------------------------------------------------------------------------


def contract_rules(_: str = "") -> str:
    """The rules of `miles plugins check`: for every plugin, then by kind."""
    from miles_core.testing import checks, kits

    found: dict[str, Iterable[Any]] = {"Every plugin": checks.RULES}
    found |= {_plural(kind): kits.rules_of(kind) for kind in declaration_kinds().values()}
    parts = []
    for title, rules in found.items():
        rows = [(f"`{rule.__name__}`", linked(prose(rule.__doc__ or ""))) for rule in rules]
        parts.append(f"## {title}\n\n{table(('Rule', 'What it asks'), rows) if rows else _NO_RULES}")
    return "\n".join(parts)


_NO_RULES = "Nothing of their own.\n"


# ---- Plugins --------------------------------------------------------------------------------------------------------


def components(_: str = "") -> str:
    """Every component of every plugin, by kind."""
    parts = []
    for kind in declaration_kinds().values():
        rows = [
            (_component(entry, f"{REFERENCE}/plugins"), prose(entry.spec.summary), _home(entry))
            for entry in catalog().all(kind)
        ]
        if rows:
            parts.append(f"## {_plural(kind)}\n\n{table(('Name', 'What it is', 'Plugin'), rows)}")
    return "\n".join(parts)


def _home(entry: Entry[Any]) -> str:
    return f"[{entry.plugin.name}]({entry.plugin.name}.md)"


def plugin_page(plugin: Plugin) -> str:
    """A plugin's README and everything that it offers."""
    head, _, rest = _readme(plugin).partition("\n")
    kinds = [kind for kind in declaration_kinds().values() if any(isinstance(one, kind) for one in plugin.records)]
    parts = [f"{head}\n\n{rest.strip()}\n"]
    for kind in kinds:
        parts.append(f"## {_plural(kind)}\n")
        parts += [_record(record) for record in plugin.records if isinstance(record, kind)]
    return "\n".join(parts)


def folder_of(plugin: Plugin) -> Path:
    """The folder of a plugin's distribution, relative to the repository."""
    (found,) = (path.parent for path in ROOT.glob("miles-*/**/pyproject.toml") if path.parent.name == plugin.name)
    return found.relative_to(ROOT)


def _readme(plugin: Plugin) -> str:
    """The README, with links that fit where it is shown. What has no page on the site is named without a link."""
    folder = folder_of(plugin)
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")

    def moved(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        page = page_of(posixpath.normpath(posixpath.join(folder.as_posix(), target)))
        if page is None:
            return match[1]
        link = posixpath.relpath(page, f"{REFERENCE}/plugins")
        return f"[{match[1]}]({link}{'#' + anchor if anchor else ''})"

    return re.sub(r"\[([^\]]+)\]\((?!\w+:|#)([^)\s]+)\)", moved, text)


def page_of(path: str) -> str | None:
    """The page of the site that shows a file of the repository; None if there is none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in (".", "README.md"):
        return "index.md"
    name = path.removesuffix("/README.md").rpartition("/")[2]
    return f"{REFERENCE}/plugins/{name}.md" if any(name == plugin.name for plugin in catalog().plugins) else None


def _record(record: Spec) -> str:
    folder = f"{REFERENCE}/plugins"
    parts = [f"### {record.kind} `{record.name}` {{#{_anchor(record)}}}\n", f"{prose(record.summary)}"]
    traits = list(_traits(record))
    if traits:
        parts.append("\n".join(f"- {name}: {value}" for name, value in traits) + "\n")
    if isinstance(record, RecipeSpec):
        return "\n".join([*parts, _recipe(record)])
    if isinstance(record, CommandSpec):
        command = resolve(record.ref)
        context = click.Context(command, info_name=f"miles {record.name}", terminal_width=WIDTH)
        parts.append(code(f"$ miles {record.name} --help\n{command.get_help(context)}", "console"))
        return "\n".join(parts)
    found = options_of(record)
    if found is not None:
        parts += [
            linked(prose(introduction(found)), folder) if introduction(found) else "",
            _options_table(found, folder),
        ]
    parts.append(_implementation(record.ref))
    return "\n".join(parts)


def _traits(record: Spec) -> Iterator[tuple[str, str]]:
    """Every field that a kind adds to `Spec` and that is not at its default, as code."""
    common = {field.name for field in dataclasses.fields(Spec)} - {"extra", "gpu_extra"}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name not in common and value != _default_of(field):
            yield f"`{field.name}`", _words(value)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"`{key}` if `{item}`" for key, item in sorted(value.items())) or "none"
    if isinstance(value, (frozenset, tuple)):
        return ", ".join(f"`{item}`" for item in (sorted(value) if isinstance(value, frozenset) else value)) or "none"
    return ("yes" if value else "no") if isinstance(value, bool) else f"`{value}`"


def _recipe(record: RecipeSpec) -> str:
    from importlib.resources import files

    package, _, path = record.ref.partition(":")
    return code((files(package) / path).read_text(encoding="utf-8"), "toml", f"{record.name}.toml")


def _implementation(ref: str) -> str:
    """What the implementation's module and the function or class itself say, folded; read without importing it."""
    module, _, attribute = ref.partition(":")
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    own = next((ast.get_docstring(node) for node in nodes if node.name == attribute.partition(".")[0]), None)
    texts = [text for text in (ast.get_docstring(tree), own) if text]
    folder = f"{REFERENCE}/plugins"
    inner = "\n\n".join(linked(prose(text), folder).strip() for text in texts)
    indented = "\n".join(f"    {line}".rstrip() for line in inner.splitlines())
    return f'??? quote "In the words of its code: {ref}"\n\n{indented}\n' if texts else f"Code: `{ref}`\n"


PARTS: Mapping[str, Callable[[str], str]] = {
    "declaration-hooks": declaration_hooks,
    "lifecycle-hooks": lifecycle_hooks_of,
    "records": records,
    "interfaces": interfaces,
    "run-file": run_file,
    "help": command_help,
    "contract-rules": contract_rules,
    "components": components,
}
