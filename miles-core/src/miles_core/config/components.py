"""Components of a run file: a table that names a record of the catalog and holds the options of what it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from miles_core.config.build import build, convert, plain
from miles_core.config.schema import Component
from miles_core.config.source import Key, Node, dotted
from miles_core.errors import UserError, nearest
from miles_core.plugins import Catalog, options_of
from miles_core.specs import (
    AdvantageSpec,
    CallbackSpec,
    CorrectionSpec,
    DataSourceSpec,
    EngineSpec,
    FilterSpec,
    LossSpec,
    RewardSpec,
    RolloutSpec,
    Spec,
    TrackerSpec,
    TrainerSpec,
)

COMPONENTS: Mapping[str, type[Spec]] = {
    "engine": EngineSpec,
    "trainer": TrainerSpec,
    "critic": TrainerSpec,
    "data": DataSourceSpec,
    "rollout": RolloutSpec,
    "reward": RewardSpec,
    "filters": FilterSpec,
    "advantage": AdvantageSpec,
    "loss": LossSpec,
    "corrections": CorrectionSpec,
    "callbacks": CallbackSpec,
    "trackers": TrackerSpec,
}
"""Sections that are a component, or a list of some: a name, or a table with one."""

T = TypeVar("T")
S = TypeVar("S", bound=Spec)


@dataclass(frozen=True, kw_only=True)
class Named:
    """Core's part of a section to which core adds nothing but the name."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Built(Generic[S]):
    """A component with its options, core's own part of its section, and the section with every default filled in."""

    component: Component[S]
    section: Any
    node: Node


def build_component(kind: type[S], table: Node, at: Key, catalog: Catalog, section: type[Any] = Named) -> Built[S]:
    """The component that `table` describes; `section` is the dataclass of core's own keys, `name` among them.

    Raises `UserError` for an unknown name, an unknown key, and whatever `build` refuses.
    """
    table = as_table(table)
    if not isinstance(table.value, dict) or "name" not in table.value:
        raise UserError(
            f"{table.origin}: {dotted(at)} must be a table with the name of {_a(kind)}; {_known(kind, catalog)}"
        )
    name = convert(str, table.value["name"], (*at, "name"))
    try:
        entry = catalog.get(kind, name)
    except UserError as error:
        raise error.placed(f"{table.value['name'].origin}: {dotted(at)}") from error.__cause__
    own, options = _split(entry.spec, table, at, section)
    component = Component(spec=entry.spec, plugin=entry.plugin.name, options=build_options(entry.spec, options, at))
    built = build(section, own, at)
    return Built(component=component, section=built, node=completed(_values(built, component), table))


def _a(kind: type[Spec]) -> str:
    return f"an {kind.kind}" if kind.kind[0] in "aeiou" else f"a {kind.kind}"


def _known(kind: type[Spec], catalog: Catalog) -> str:
    names = ", ".join(entry.spec.name for entry in catalog.all(kind))
    return f"known: {names}" if names else "no installed plugin offers one"


def as_table(node: Node) -> Node:
    """`"name"` is short for `{name = "name"}`."""
    return Node({"name": node}, node.origin) if isinstance(node.value, str) else node


@dataclass(frozen=True, kw_only=True)
class _NoOptions:
    """Refuses every key."""


def build_options(spec: Spec, table: Node, at: Key) -> Any:
    """An instance of the record's options, None if it has none. Raises `UserError`."""
    options = options_of(spec)
    built: Any = build(options or _NoOptions, table, at)
    return None if options is None else built


def _split(spec: Spec, table: Node, at: Key, section: type[Any]) -> tuple[Node, Node]:
    """Core's keys and the component's."""
    own = {field.name for field in dataclasses.fields(section)}
    options = options_of(spec)
    others = {field.name for field in dataclasses.fields(options)} if options is not None else set()
    for key, node in table.value.items():
        if key not in own | others:
            raise UserError(
                f"{node.origin}: {dotted(at)} ({spec.kind} {spec.name!r}) has no option {key!r}. "
                f"{nearest(key, own | others)}"
            )
    first = {key: node for key, node in table.value.items() if key in own}
    second = {key: node for key, node in table.value.items() if key not in own}
    return Node(first, table.origin), Node(second, table.origin)


def _values(section: Any, component: Component[Any]) -> dict[str, Any]:
    return {**plain(section), **(plain(component.options) if component.options is not None else {})}


def completed(values: Any, given: Node | None) -> Node:
    """`values` as a tree whose origins are those of `given`, and "default" where nothing was given."""
    origin = "default" if given is None else given.origin
    if isinstance(values, Mapping):
        known = given.value if given is not None and isinstance(given.value, dict) else {}
        return Node({key: completed(value, known.get(key)) for key, value in values.items()}, origin)
    if isinstance(values, list):
        items = given.value if given is not None and isinstance(given.value, list) else [None] * len(values)
        return Node([completed(value, item) for value, item in zip(values, items, strict=True)], origin)
    return Node(values, origin)


class SectionReader:
    """Builds the sections of one table, the run or a stage, and gathers in `tree` what they resolve to.

    at: where the table stands in the run file. All methods raise `UserError`.
    """

    def __init__(self, table: Node, at: Key, catalog: Catalog) -> None:
        self.table = table
        self.at = at
        self.catalog = catalog
        self.tree: dict[str, Node] = {}

    def section(self, key: str, cls: type[T]) -> T:
        """A section that core owns."""
        given = self.table.value.get(key)
        section = build(cls, given or Node({}, self.table.origin), (*self.at, key))
        self.tree[key] = completed(plain(section), given)
        return section

    def component(self, key: str, kind: type[S], section: type[Any] = Named) -> Built[S]:
        """A component that there must be."""
        built = self.optional(key, kind, section)
        if built is None:
            raise UserError(
                f"{self.table.origin}: there is no {dotted((*self.at, key))}; add [{key}] with the name of "
                f"{_a(kind)}; {_known(kind, self.catalog)}"
            )
        return built

    def optional(self, key: str, kind: type[S], section: type[Any] = Named) -> Built[S] | None:
        """A component, None if the table has no such section."""
        given = self.table.value.get(key)
        if given is None:
            return None
        built = build_component(kind, given, (*self.at, key), self.catalog, section)
        self.tree[key] = built.node
        return built

    def components(self, key: str, kind: type[S], section: type[Any] = Named) -> list[Built[S]]:
        """A list of components; a single table is short for a list of one."""
        given = self.table.value.get(key, Node([], "default"))
        items = given.value if isinstance(given.value, list) else [given]
        at = (*self.at, key)
        built = [build_component(kind, item, (*at, index), self.catalog, section) for index, item in enumerate(items)]
        self.tree[key] = Node([one.node for one in built], given.origin)
        return built
