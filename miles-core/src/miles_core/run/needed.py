"""What a run file or a recipe needs of its environment and does not find there: for `miles doctor`.

A run whose packages are missing cannot be planned, so nothing is built here: the layers are read, the components that
they name are looked up, and what their plugins declare is compared with what is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles_core.config.components import COMPONENTS
from miles_core.config.layers import read_run
from miles_core.config.source import Node
from miles_core.errors import UserError
from miles_core.installation import Machine, needs, unmet
from miles_core.plugins import CORE, Catalog, Entry
from miles_core.run.plan import make_plan
from miles_core.specs import RecipeSpec


@dataclass(frozen=True, kw_only=True)
class Missing:
    """what: is missing, and who needs it; install: what pip is told, None if it is nothing that pip installs."""

    what: str
    install: str | None = None


def missing(target: str, overrides: Sequence[str], catalog: Catalog, machine: Machine) -> list[Missing]:
    """Everything that the run lacks here; if that is nothing, why it cannot be planned.

    Raises `UserError` for a run file or a recipe that is not there or cannot be read.
    """
    recipes: list[RecipeSpec] = []
    try:
        doc = read_run(target, overrides, catalog, check=recipes.append).doc
    except UserError:
        if not (found := list(_of_recipes(recipes))):
            raise
        return found  # what is not installed may offer what could not be read
    found = [*_of_recipes(recipes), *_of_components(doc, catalog), *_of_gpus(doc.plain(), machine)]
    found = list(dict.fromkeys(found))
    if not found:
        try:
            make_plan(target, overrides, catalog)
        except UserError as error:
            found.append(Missing(what=str(error)))
    return found


def _of_recipes(recipes: Iterable[RecipeSpec]) -> Iterator[Missing]:
    for spec in recipes:
        for one in unmet(spec.requires):
            yield Missing(what=f"recipe {spec.name!r} needs {one.requirement}, {one.lack}", install=one.requirement)


def _of_components(doc: Node, catalog: Catalog) -> Iterator[Missing]:
    """What the plugins of the run's components need for themselves, and for the extras that their records name."""
    for key, name, on_gpus in _named(doc.plain()):
        try:
            entry: Entry[Any] = catalog.get(COMPONENTS[key], name)
        except UserError as error:
            yield Missing(what=f"{key}: {error}")
            continue
        if entry.plugin.name != CORE:
            extras = ("", entry.spec.extra, entry.spec.gpu_extra if on_gpus else None)
            yield from _of_component(entry, [extra for extra in extras if extra is not None])


def _of_component(entry: Entry[Any], extras: Iterable[str]) -> Iterator[Missing]:
    for extra in extras:
        install = f"{entry.plugin.name}[{extra}]" if extra else entry.plugin.name
        for need in needs(entry.plugin.name, extra):
            if not need.good:
                who = f"{entry.spec.kind} {entry.spec.name!r}"
                yield Missing(what=f"{who} needs {need.requirement} ({install}), {need.lack}", install=install)


def _named(run: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Section, name and whether it asks for GPUs, of every component that a run, its stages or its teacher name."""
    for key in COMPONENTS:
        given = run.get(key)
        for item in given if isinstance(given, list) else [given]:
            name = item.get("name") if isinstance(item, dict) else item
            if isinstance(name, str):
                yield key, name, bool(isinstance(item, dict) and item.get("gpus"))
    critic = run.get("critic")
    if isinstance(critic, dict) and "loss" in critic:
        yield from _named({"loss": critic["loss"]})
    for inner in (run.get("teacher"), *_stages(run.get("stages"))):
        if isinstance(inner, dict):
            yield from _named(inner)


def _stages(given: Any) -> list[Any]:
    if isinstance(given, dict):
        return list(given.values())
    return given if isinstance(given, list) else []


def _of_gpus(run: Mapping[str, Any], machine: Machine) -> Iterator[Missing]:
    """GPUs, for a run on this machine alone; a cluster's are not known here."""
    if _table(run, "cluster").get("address") is not None:
        return
    trainer, engine = _gpus(_table(run, "trainer")), _gpus(_table(run, "engine"))
    shared = _table(run, "placement").get("layout") == "colocated"
    wanted = max(trainer, engine) if shared else trainer + engine
    wanted += _gpus(_table(run, "critic")) + _gpus(_table(_table(run, "teacher"), "engine"))
    if wanted > len(machine.gpus):
        here = f"this machine has {len(machine.gpus)}" if machine.gpus else "this machine shows none (nvidia-smi)"
        yield Missing(what=f"the run asks for {wanted} GPUs, {here}")


def _table(run: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    given = run.get(key)
    return given if isinstance(given, dict) else {}


def _gpus(section: Mapping[str, Any]) -> int:
    each, count = section.get("gpus", 0), section.get("count", 1)
    return each * count if isinstance(each, int) and isinstance(count, int) else 0
