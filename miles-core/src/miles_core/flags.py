"""Flags of the software that a component stands on, by their own names: `miles train RUN -- --mem-fraction-static 0.8`.

A trainer's or an engine's record names in `flags` a function without arguments that gives its `Flags`: where in the
component's section the value of each stands. It may import what it likes: it is called only where such flags are given.
`from_parser` makes them of an `argparse` parser, so that nothing has to be declared again.
"""

from __future__ import annotations

import argparse
import enum
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

Place = tuple[str, ...]
"""The way to an option below a component's section: ("parallel", "tensor_model_parallel_size")."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag. read: the words that follow it -> the value, or `ValueError`. places: the options that get the value;
    none if the flag is refused, for the reason `refusal`."""

    read: Callable[[Sequence[str]], Any]
    places: tuple[Place, ...] = ()
    refusal: str = ""

    def __post_init__(self) -> None:
        if bool(self.places) == bool(self.refusal):
            raise ValueError("a flag has either places or a refusal")


Flags = Mapping[str, Flag]
"""A flag with its dashes ("--mem-fraction-static") -> what it means."""


def from_parser(
    parser: argparse.ArgumentParser, place: Callable[[argparse.Action], Sequence[Place] | str]
) -> dict[str, Flag]:
    """Every long flag of a parser. place: the options that an action's value goes to, or why the flag is refused."""
    found: dict[str, Flag] = {}
    for action in parser._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        where = place(action) if names else ()
        for name in names:
            refusal = where if isinstance(where, str) else ""
            places = () if isinstance(where, str) else tuple(where)
            found[name] = Flag(places=places, refusal=refusal, read=_reader(action, name))
    return found


class _Parser(argparse.ArgumentParser):
    """Says what is wrong instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument [^:]+: ", "", message))


def _reader(action: argparse.Action, name: str) -> Callable[[Sequence[str]], Any]:
    """Reads one flag as its parser does, without what the parser wants of the others."""

    def read(words: Sequence[str]) -> Any:
        parser = _Parser(add_help=False, allow_abbrev=False)
        parser._add_action(action)
        return plain(getattr(parser.parse_args([name, *words]), action.dest))

    return read


def plain(value: Any) -> Any:
    """What a parser made of a word, as a run file can say it: an enumeration's member by its name."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value
