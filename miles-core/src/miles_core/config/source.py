"""Run files as trees in which every value knows where it was written.

A run is described in layers: a recipe, a run file over it, flags over both. Each layer becomes a tree of `Node`s and
`merge` lays one over the other, so that the origin of a value survives into messages and into `miles plan`.
"""

from __future__ import annotations

import datetime
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles_core.errors import UserError, nearest

Key = tuple[str | int, ...]
"""The way to a value: names of keys and numbers of list items."""


@dataclass(frozen=True)
class Node:
    """A value and where it was written. value: dict of nodes, list of nodes, or a scalar."""

    value: Any
    origin: str

    def plain(self) -> Any:
        """The value without its origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def leaves(self, path: Key = ()) -> Iterator[tuple[Key, Node]]:
        """Every scalar, list of scalars and empty table, with the way to it."""
        if isinstance(self.value, dict) and self.value:
            for key, node in self.value.items():
                yield from node.leaves((*path, key))
        elif isinstance(self.value, list) and any(isinstance(node.value, (dict, list)) for node in self.value):
            for index, node in enumerate(self.value):
                yield from node.leaves((*path, index))
        else:
            yield path, self


def dotted(path: Key) -> str:
    """A path as it is written in a flag: `stages.grpo.loss.clip_high`."""
    return ".".join(str(part) for part in path)


# ---- Files --------------------------------------------------------------------------------------------------------


def read_toml(text: str, where: Callable[[int], str]) -> Node:
    """The tree of a TOML document; `where` turns a line number, from 1, into an origin.

    Raises `UserError` with the line for text that is not TOML.
    """
    text = text.replace("\r\n", "\n")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, line = _split_position(str(error), text)
        raise UserError(f"{where(line)}: this is not valid TOML: {what}") from None
    lines = _Scanner(text).lines()

    def tree(value: Any, path: Key, line: int) -> Node:
        line = lines.get(path, line)
        if isinstance(value, dict):
            return Node({key: tree(item, (*path, key), line) for key, item in value.items()}, where(line))
        if isinstance(value, list):
            return Node([tree(item, (*path, index), line) for index, item in enumerate(value)], where(line))
        return Node(value, where(line))

    return tree(values, (), 1)


def _split_position(message: str, text: str) -> tuple[str, int]:
    """tomllib says the position only at the end of its message."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", message, re.DOTALL)
    if found is None:
        return message, 1
    return found[1], int(found[2]) if found[2] else text.count("\n") + 1


_SPACE = re.compile(r"(?:[ \t]|\n|#[^\n]*)*")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}' + r"|'''.*?'{3,5}" + r'|"(?:[^"\\\n]|\\.)*"' + r"|'[^'\n]*'", re.DOTALL
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}\n#]+")


class _Scanner:
    """Finds the line of every key and list item in text that is known to be valid TOML."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[Key, int] = {}
        self.arrays: dict[Key, int] = {}

    def lines(self) -> dict[Key, int]:
        table: Key = ()
        while self._skip():
            if self.text.startswith("[[", self.at):
                table = self._header(2)
            elif self.text[self.at] == "[":
                table = self._header(1)
            else:
                self._pair(table)
        return self.found

    def _skip(self) -> bool:
        """Passes over space, line ends and comments; false at the end."""
        self.at = self._match(_SPACE, self.at)
        return self.at < len(self.text)

    def _match(self, pattern: re.Pattern[str], at: int) -> int:
        found = pattern.match(self.text, at)
        assert found is not None, f"valid TOML does not match {pattern.pattern!r} at {at}"
        return found.end()

    def _note(self, path: Key) -> None:
        line = self.text.count("\n", 0, self.at) + 1
        for length in range(1, len(path) + 1):
            self.found.setdefault(path[:length], line)

    def _header(self, brackets: int) -> Key:
        start = self.at
        self.at += brackets
        names = self._key()
        path = self._resolve(names[:-1]) + names[-1:]
        self.at, end = start, self.at
        if brackets == 2:
            self.arrays[path] = self.arrays.get(path, -1) + 1
            path = (*path, self.arrays[path])
        else:
            path = self._resolve(names)
        self._note(path)
        self.at = end + brackets
        return path

    def _resolve(self, names: Key) -> Key:
        """A header's names lead to the newest item of every array of tables on the way."""
        path: Key = ()
        for name in names:
            path = (*path, name)
            if path in self.arrays:
                path = (*path, self.arrays[path])
        return path

    def _key(self) -> Key:
        """A dotted key; stops at what comes after it."""
        names: list[str] = []
        while True:
            self._skip()
            quoted = self.text[self.at] in "\"'"
            end = self._match(_STRING if quoted else _BARE_KEY, self.at)
            name = self.text[self.at : end]
            names.append(str(tomllib.loads(f"name = {name}")["name"]) if quoted else name)
            self.at = end
            self._skip()
            if self.text[self.at] != ".":
                return tuple(names)
            self.at += 1

    def _pair(self, table: Key) -> None:
        start = self.at
        path = table + self._key()
        self.at, end = start, self.at
        self._note(path)
        self.at = end + 1  # the equals sign
        self._value(path)

    def _value(self, path: Key) -> None:
        self._skip()
        self._note(path)
        opening = self.text[self.at]
        if opening == "[":
            self._items("]", lambda index: self._value((*path, index)))
        elif opening == "{":
            self._items("}", lambda _: self._pair(path))
        else:
            self.at = self._match(_STRING if opening in "\"'" else _SCALAR, self.at)

    def _items(self, closing: str, item: Callable[[int], None]) -> None:
        self.at += 1
        index = 0
        while self._skip() and self.text[self.at] != closing:
            if self.text[self.at] == ",":
                self.at += 1
            else:
                item(index)
                index += 1
        self.at += 1


# ---- Flags --------------------------------------------------------------------------------------------------------


def read_flags(flags: Sequence[str]) -> Node:
    """The tree of `key.key=value` flags, a later one over an earlier one. Raises `UserError` for another form."""
    tree = Node({}, "flags")
    for flag in flags:
        tree = merge(tree, _read_flag(flag))
    return tree


def _read_flag(flag: str) -> Node:
    name, equals, value = flag.partition("=")
    origin = f"flag {flag}"
    try:
        path = list(_keys(tomllib.loads(f"{name} = 0")))
    except tomllib.TOMLDecodeError:
        path = []
    if not equals or not path or "\n" in name:
        raise UserError(f"{flag!r} is not an override; write it as loss.clip_high=0.3")
    return written(path, parse_value(value), origin)


def written(path: Sequence[str], value: Any, origin: str) -> Node:
    """A tree of which `origin` says one value."""
    node = _node(value, origin)
    for key in reversed(path):
        node = Node({key: node}, origin)
    return node


def _keys(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield key
        if isinstance(value, dict):
            yield from _keys(value)


def parse_value(text: str) -> Any:
    """TOML, or else a bare string; dates too are bare strings, because no option is one."""
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    dates = (datetime.date, datetime.time)
    return text if len(values) != 1 or isinstance(values["value"], dates) else values["value"]


def _node(value: Any, origin: str) -> Node:
    """A tree that was all written in one place."""
    if isinstance(value, dict):
        return Node({key: _node(item, origin) for key, item in value.items()}, origin)
    if isinstance(value, list):
        return Node([_node(item, origin) for item in value], origin)
    return Node(value, origin)


# ---- Layers -------------------------------------------------------------------------------------------------------


def merge(base: Node, over: Node, path: Key = ()) -> Node:
    """`over` laid over `base`: tables key by key, everything else as a whole.

    A table with another `name` is another component: the options of the old one go with its name, and what core itself
    reads in that section stays. So it is with a model of another path or family, and what described the old one.
    A table over a component's bare name gives it options. A table over a list changes the items that its keys name or
    number; one reward is its own item 0.
    """
    if not isinstance(over.value, dict):
        return over
    if path and isinstance(base.value, str):
        base = Node({"name": base}, base.origin)
    if isinstance(base.value, list) and "name" not in over.value:
        return _merge_items(base, over, path)
    if path[-1:] == ("reward",) and _addresses_single(base, over):
        return _merge_items(Node([base], base.origin), over, path)
    if not isinstance(base.value, dict):
        return over
    kept = dict(base.value)
    if _renames(base, over, path):
        kept = {key: node for key, node in kept.items() if key in _core_keys(path)}
    kept = {key: node for key, node in kept.items() if key not in _superseded(base, over, path)}
    for key, node in over.value.items():
        kept[key] = merge(kept[key], node, (*path, key)) if key in kept else node
    return Node(kept, base.origin)


def _addresses_single(base: Node, over: Node) -> bool:
    name = item_name(base)
    return name is not None and bool(over.value) and set(over.value) <= {"0", name}


def _renames(base: Node, over: Node, path: Key) -> bool:
    if not path or "name" not in base.value or "name" not in over.value:
        return False
    return bool(base.value["name"].value != over.value["name"].value)


def _core_keys(path: Key) -> frozenset[str]:
    """Core's own keys in the section at `path`, beside a component's options; in the reward's, if it is an item."""
    from miles_core.config.schema import own_keys  # needs numpy, which commands that only show a tree do not

    own = own_keys("reward" if "reward" in path[-2:] else str(path[-1]))
    return own | {"loss"} if path[-1] == "critic" else own


def _superseded(base: Node, over: Node, path: Key) -> frozenset[str]:
    """What describes the model that is replaced."""
    if path != ("model",):
        return frozenset()
    if "path" in over.value:
        return frozenset({"family", "config", "tokenizer"})
    family = over.value.get("family")
    if family is not None and ("family" not in base.value or base.value["family"].value != family.value):
        return frozenset({"path", "config"})
    return frozenset()


def _merge_items(base: Node, over: Node, path: Key) -> Node:
    items = list(base.value)
    for key, node in over.value.items():
        index = _index(items, key, node, path)
        item = items[index]
        if isinstance(node.value, dict) and isinstance(item.value, str):
            item = Node({"name": item}, item.origin)
        items[index] = merge(item, node, (*path, key))
    return Node(items, base.origin)


def _index(items: list[Node], key: str, node: Node, path: Key) -> int:
    names = [item_name(item) for item in items]
    if names.count(key) == 1:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    name = dotted(path)
    if key in names:
        raise UserError(f"{node.origin}: {name} has several {key!r}; number them, from {name}.0")
    known = [known for known in names if known] or [str(index) for index in range(len(items))]
    raise UserError(f"{node.origin}: {name} has no item {key!r}. {nearest(key, known)}")


def item_name(item: Node) -> str | None:
    """The name that a list item goes by: its `name`, or the item itself if it is a string."""
    if isinstance(item.value, dict):
        item = item.value.get("name", item)
    return item.value if isinstance(item.value, str) else None


def blame(message: str, origins: Mapping[str, str]) -> str | None:
    """The origin of a value that a message names: a flag if there is one, else the first; None if it names none."""
    named = [origins[word] for word in re.findall(r"\w+", message) if word in origins]
    return next((origin for origin in named if origin.startswith("flag ")), named[0] if named else None)


def toml_text(values: Mapping[str, Any]) -> str:
    """A mapping as TOML; None, which TOML has no word for, is left out."""
    import tomli_w

    return tomli_w.dumps(_without_none(values))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def shown(value: Any) -> str:
    """A value as a run file would say it, on one line."""
    return "unset" if value is None else json.dumps(value, ensure_ascii=False, default=str)
