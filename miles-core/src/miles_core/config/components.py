"""Components of a run file: a table that names a record of the catalog and holds the options of what it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles_core.config.build import build, convert, plain
from miles_core.config.schema import Component
from miles_core.config.source import Key, Node, dotted
from miles_core.errors import UserError, nearest
from miles_core.plugins import Catalog, options_of
from miles_core.specs import Spec


@dataclass(frozen=True, kw_only=True)
class Named:
    """Core's part of a section to which core adds nothing but the name."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Built:
    """A component with its options, core's own part of its section, and the section with every default filled in."""

    component: Component
    section: Any
    node: Node


def build_component(kind: type[Spec], table: Node, at: Key, catalog: Catalog, section: type[Any] = Named) -> Built:
    """The component that `table` describes; `section` is the dataclass of core's own keys, `name` among them.

    Raises `UserError` for an unknown name, an unknown key, and whatever `build` refuses.
    """
    table = as_table(table)
    if not isinstance(table.value, dict) or "name" not in table.value:
        known = ", ".join(entry.spec.name for entry in catalog.all(kind))
        raise UserError(f"{table.origin}: {dotted(at)} must be a table with the name of a {kind.kind}. Known: {known}.")
    name = convert(str, table.value["name"], (*at, "name"))
    try:
        entry = catalog.get(kind, name)
    except UserError as error:
        raise UserError(f"{table.value['name'].origin}: {dotted(at)}: {error}") from None
    own, options = _split(entry.spec, table, at, section)
    component = Component(spec=entry.spec, plugin=entry.plugin.name, options=build_options(entry.spec, options, at))
    built = build(section, own, at)
    return Built(component=component, section=built, node=completed(_values(built, component), table))


def as_table(node: Node) -> Node:
    """`"name"` is short for `{name = "name"}`."""
    return Node({"name": node}, node.origin) if isinstance(node.value, str) else node


def build_options(spec: Spec, table: Node, at: Key) -> Any:
    """An instance of the record's options, None if it has none. Raises `UserError`."""
    options = options_of(spec)
    return None if options is None else build(options, table, at)


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


def _values(section: Any, component: Component) -> dict[str, Any]:
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
