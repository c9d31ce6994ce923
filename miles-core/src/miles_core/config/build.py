"""From a table of a run file to a frozen dataclass, with every type checked, and back."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from miles_core.config.source import Key, Node, blame, dotted, shown
from miles_core.errors import MissingExtraError, UserError, nearest

T = TypeVar("T")

_SCALARS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def build(cls: type[T], table: Node, at: Key) -> T:
    """An instance of the dataclass `cls` from a table; `at` is where the table stands in the run file.

    Field types may be bool, int, float (which accepts int), str, Literal, X | None, tuple[X, ...], Mapping[str, X],
    Any and dataclasses of these. Raises `UserError` with name and origin for an unknown key, a missing one, a wrong
    type, and for whatever ValueError the dataclass raises; a `MissingExtraError` stays one.
    """
    if not isinstance(table.value, dict):
        raise _wrong("a table", table, at)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key, node in table.value.items():
        if key not in fields:
            place = f"{dotted(at)} has" if at else "there is"
            raise UserError(f"{node.origin}: {place} no option {key!r}. {nearest(key, fields)}")
    hints = typing.get_type_hints(cls)
    values = {key: convert(hints[key], node, (*at, key)) for key, node in table.value.items()}
    for name, field in fields.items():
        if name not in values and _required(field):
            raise UserError(f"{table.origin}: {dotted((*at, name))} is missing; it must be {describe(hints[name])}")
    try:
        return cls(**values)
    except ValueError as error:
        given = {key: node.origin for key, node in table.value.items()}
        inner = {key: node for key, node in table.value.items() if isinstance(node.value, dict)}
        leaves = {str(path[-1]): node.origin for path, node in Node(inner, table.origin).leaves() if path}
        where = blame(str(error), leaves) or blame(str(error), given) or table.origin
        kind = MissingExtraError if isinstance(error, MissingExtraError) else UserError
        raise kind(f"{where}: {_named(at, fields, str(error))}") from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _named(at: Key, fields: Iterable[str], message: str) -> str:
    """A dataclass's own message, with the full name of the field that it begins with."""
    if not at:
        return message
    message = message.removeprefix(f"{at[-1]}.")
    names_field = any(re.match(rf"{re.escape(field)}\b", message) for field in fields)
    return f"{dotted(at)}{'.' if names_field else ': '}{message}"


def convert(hint: Any, node: Node, at: Key) -> Any:
    """The value of a node as the type `hint`; raises `UserError` if it is not one."""
    kind = typing.get_origin(hint) or hint
    if hint is Any:
        return node.plain()
    if kind in (typing.Union, types.UnionType):
        return _union(hint, node, at)
    if kind is typing.Literal:
        return _literal(hint, node, at)
    if kind is tuple:
        return _tuple(hint, node, at)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), node, at)
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return _mapping(hint, node, at)
    return _scalar(hint, node, at)


def _scalar(hint: Any, node: Node, at: Key) -> Any:
    value = node.value
    assert hint in _SCALARS, f"{dotted(at)}: options of type {hint} are not supported"
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint or (hint is float and math.isnan(value)):
        raise _wrong(describe(hint), node, at)
    return value


def _union(hint: Any, node: Node, at: Key) -> Any:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if len(options) == 1:  # an error of the one type there is says more than "none fits"
        return convert(options[0], node, at)
    for option in options:
        try:
            return convert(option, node, at)
        except UserError:
            continue
    raise _wrong(describe(hint), node, at)


def _literal(hint: Any, node: Node, at: Key) -> Any:
    known = typing.get_args(hint)
    for option in known:
        if type(option) is type(node.value) and option == node.value:
            return option
    suggestion = f" {nearest(node.value, known)}" if isinstance(node.value, str) and _all_strings(known) else ""
    raise UserError(f"{_wrong(describe(hint), node, at)}.{suggestion}")


def _all_strings(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, str) for value in values)


def _tuple(hint: Any, node: Node, at: Key) -> tuple[Any, ...]:
    if not isinstance(node.value, list):
        raise _wrong(describe(hint), node, at)
    item = typing.get_args(hint)[0]
    return tuple(convert(item, child, (*at, index)) for index, child in enumerate(node.value))


def _mapping(hint: Any, node: Node, at: Key) -> dict[str, Any]:
    if not isinstance(node.value, dict):
        raise _wrong(describe(hint), node, at)
    arguments = typing.get_args(hint)
    item = arguments[1] if arguments else Any
    return {key: convert(item, child, (*at, key)) for key, child in node.value.items()}


def _wrong(expected: str, node: Node, at: Key) -> UserError:
    return UserError(f"{node.origin}: {dotted(at)} must be {expected}, got {shown(node.plain())}")


def describe(hint: Any) -> str:
    """A type in words, as in "must be a number"."""
    if hint in _SCALARS:
        return _SCALARS[hint]
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments if option is not type(None))
    if kind is typing.Literal:
        return f"one of {', '.join(shown(option) for option in arguments)}"
    if kind is tuple:
        return f"a list, each item {describe(arguments[0])}"
    return "anything" if hint is Any else "a table"


def plain(value: Any) -> Any:
    """The opposite of `build`: dataclasses and mappings as dicts, tuples as lists, with None where nothing is set."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
