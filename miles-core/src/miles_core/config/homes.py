"""Whose component a recipe means by a bare name: its own plugin's, then that of a plugin that it requires.

What else is installed cannot change what a recipe means. Where several plugins offer a name, the recipe's tree says
"plugin:name", so that whatever reads it, a run that is resumed too, finds the same component.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from packaging.requirements import Requirement

from miles_core.config.components import COMPONENTS
from miles_core.config.source import Node
from miles_core.plugins import CORE, Catalog, Entry, normalised
from miles_core.specs import ModelSpec, RecipeSpec, Spec, WeightSyncSpec

NAMES: Mapping[tuple[str, str], type[Spec]] = {
    ("model", "family"): ModelSpec,
    ("publish", "sync"): WeightSyncSpec,
}
"""Options of core's own sections that name a component."""

INNER: Mapping[str, str] = {"critic": "loss", "teacher": "engine"}
"""Section -> the component in it."""


def with_plugins(layer: Node, recipe: Entry[RecipeSpec], catalog: Catalog) -> Node:
    """The tree of a recipe in which every name that several plugins offer says whose it is, if that can be known."""
    return _Homes(recipe, catalog).run(layer)


class _Homes:
    def __init__(self, recipe: Entry[RecipeSpec], catalog: Catalog) -> None:
        required = {normalised(Requirement(text).name) for text in recipe.spec.requires}
        self.homes = ({recipe.plugin.name}, required | {CORE})
        self.catalog = catalog

    def run(self, table: Node) -> Node:
        """A run or a stage. A value of a wrong type is left for others to refuse."""
        return _each(table, self._section)

    def _section(self, key: str, node: Node) -> Node:
        if key == "recipe":
            return self._name(RecipeSpec, node)
        if key == "stages" and isinstance(node.value, list):
            return Node([self.run(stage) for stage in node.value], node.origin)
        if key in INNER:
            node = _each(node, lambda inner, item: self._section(inner, item) if inner == INNER[key] else item)
        if key in COMPONENTS and isinstance(node.value, list):
            return Node([self._component(COMPONENTS[key], item) for item in node.value], node.origin)
        if key in COMPONENTS:
            return self._component(COMPONENTS[key], node)
        return _each(node, lambda option, item: self._named((key, option), item))

    def _named(self, option: tuple[str, str], node: Node) -> Node:
        return self._name(NAMES[option], node) if option in NAMES else node

    def _component(self, kind: type[Spec], node: Node) -> Node:
        if isinstance(node.value, dict):
            return _each(node, lambda option, item: self._name(kind, item) if option == "name" else item)
        return self._name(kind, node)

    def _name(self, kind: type[Spec], node: Node) -> Node:
        offers = [entry.plugin.name for entry in self.catalog.all(kind) if entry.spec.name == node.value]
        if len(offers) > 1:
            for home in self.homes:
                own = [plugin for plugin in offers if plugin in home]
                if len(own) == 1:
                    return Node(f"{own[0]}:{node.value}", node.origin)
        return node


def _each(table: Node, change: Callable[[str, Node], Node]) -> Node:
    """A table whose values are changed; anything else stays."""
    if not isinstance(table.value, dict):
        return table
    return Node({key: change(key, node) for key, node in table.value.items()}, table.origin)
