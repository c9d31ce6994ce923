"""The layers of a run: a recipe, the run file over it, the flags over both."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from miles_core.config.homes import with_plugins
from miles_core.config.source import Node, dotted, merge, read_flags, read_toml
from miles_core.config.upstream import read_upstream, split
from miles_core.errors import UserError
from miles_core.installation import unmet
from miles_core.plugins import Catalog, Entry, discover
from miles_core.specs import RecipeSpec


@dataclass(frozen=True, kw_only=True)
class RunSource:
    """What the user said. doc: all layers merged; name: of the run file or the recipe; amendments: the origins of all
    that was said over the lowest layer, which must not go without effect."""

    doc: Node
    name: str
    amendments: frozenset[str] = frozenset()


def check_requirements(spec: RecipeSpec) -> None:
    """Raises `UserError` for the first of a recipe's requirements that is not installed."""
    if (need := next(unmet(spec.requires), None)) is not None:
        text = need.requirement
        raise UserError(f"recipe {spec.name!r} needs {text}, {need.lack}; pip install '{text}'")


def read_run(
    target: str, flags: Sequence[str], catalog: Catalog, check: Callable[[RecipeSpec], None] = check_requirements
) -> RunSource:
    """Reads a run file or a recipe, its recipe, and the flags, those after `--` among them. Raises `UserError`.

    check: sees every recipe before it is read.
    """
    overrides, upstream = split(flags)
    if _is_file(target):
        layers, name = _with_recipe(read_run_file(Path(target)), catalog, check), Path(target).stem
    else:
        entry = _recipe(target, catalog)
        layers, name = _recipe_layers(entry, catalog, check, ()), entry.spec.name
    said = read_flags(overrides)
    if (recipe := said.value.get("recipe")) is not None:
        raise UserError(
            f"{recipe.origin}: no flag chooses the recipe; name it in the place of {target}, or in a run file"
        )
    amendments = [*layers[1:], said]
    doc = layers[0]
    for layer in amendments:
        doc = merge(doc, layer)
    amendments.append(read_upstream(upstream, doc, catalog))
    doc = merge(doc, amendments[-1])
    origins = frozenset(node.origin for layer in amendments for _, node in layer.leaves())
    return RunSource(doc=doc, name=name, amendments=origins)


def open_catalog(target: str, flags: Sequence[str], disable: Iterable[str] = ()) -> Catalog:
    """The installed plugins, without those that the run file or the flags disable: decided before any is imported."""
    named = [plugin for layer in _own_layers(target, flags) for plugin in _disabled(layer)]
    return discover(disable=(*disable, *named))


def _own_layers(target: str, flags: Sequence[str]) -> list[Node]:
    return [*([read_run_file(Path(target))] if _is_file(target) else []), read_flags(split(flags)[0])]


def _disabled(layer: Node) -> list[str]:
    """What a layer says in plugins.disable; a wrong type there is reported when the section is built."""
    values = layer.plain().get("plugins")
    names = values.get("disable") if isinstance(values, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _is_file(target: str) -> bool:
    """A recipe is not hidden by a file or a folder that happens to have its name."""
    return target.endswith(".toml") or "/" in target


def _recipe(name: str, catalog: Catalog) -> Entry[RecipeSpec]:
    try:
        return catalog.get(RecipeSpec, name)
    except UserError as error:
        if not Path(name).is_file():
            raise
        raise UserError(f"{error}\nTo run the file of that name, say ./{name}") from None


def read_run_file(path: Path) -> Node:
    """The tree of a run file. Raises `UserError` if it is missing, no text or no TOML."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no run file {path}") from None
    except IsADirectoryError:
        hint = f"; to continue that run, say miles resume {path}" if (path / "run.toml").exists() else ""
        raise UserError(f"{path} is a folder, not a run file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"run file {path} cannot be read: {error}") from None
    return read_toml(text, lambda line: f"{path}:{line}")


def recipe_text(entry: Entry[RecipeSpec]) -> str:
    """The TOML of a recipe. Raises `UserError` if the plugin does not contain the file it names."""
    package, _, file = entry.spec.ref.partition(":")
    try:
        return importlib.resources.files(package).joinpath(file).read_text(encoding="utf-8")
    except (OSError, ModuleNotFoundError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {entry.spec.name!r} of plugin {entry.plugin.name} cannot be read: {error}") from None


def _with_recipe(
    layer: Node, catalog: Catalog, check: Callable[[RecipeSpec], None], seen: tuple[str, ...] = ()
) -> list[Node]:
    """A layer and, below it, the recipe that it builds on."""
    base = layer.value.get("recipe")
    if base is None:
        return [layer]
    if not isinstance(base.value, str):
        raise UserError(f"{base.origin}: recipe must be the name of a recipe, a string")
    try:
        entry = catalog.get(RecipeSpec, base.value)
    except UserError as error:
        raise error.placed(base.origin) from error.__cause__
    rest = Node({key: node for key, node in layer.value.items() if key != "recipe"}, layer.origin)
    return [*_recipe_layers(entry, catalog, check, seen), rest]


def _recipe_layers(
    entry: Entry[RecipeSpec], catalog: Catalog, check: Callable[[RecipeSpec], None], seen: tuple[str, ...]
) -> list[Node]:
    name = entry.spec.name
    if name in seen:
        raise UserError(f"recipe {name!r} builds on itself: {' -> '.join((*seen, name))}")
    check(entry.spec)
    layer = read_toml(recipe_text(entry), lambda line: f"recipe {name}, line {line}")
    layer = with_plugins(layer, entry, catalog)
    return _with_recipe(layer, catalog, check, (*seen, name))


def check_effect(source: RunSource, used: Node, stages: Sequence[str]) -> None:
    """Refuses a flag, or a line of a run file over a recipe, that reached no value of the resolved run.

    A stage's own value hides the one for all stages, and a run that silently ignores what was asked for is worse than
    none.
    """
    effective = {node.origin for _, node in used.leaves()}
    for path, node in source.doc.leaves():
        if node.origin in source.amendments and node.origin not in effective:
            own = " or ".join(f"stages.{stage}.{dotted(path)}" for stage in stages)
            mend = f"; say {own}" if own and path[0] != "stages" else ""
            raise UserError(f"{node.origin}: {dotted(path)} has no effect: no stage uses it{mend}")
