"""What stands after `--`: flags of the software that the run's trainer and engine stand on, as a layer of the run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from miles_core.config.components import as_table
from miles_core.config.source import Node, dotted, merge, written
from miles_core.errors import MissingExtraError, UserError, close
from miles_core.flags import Flag, Flags
from miles_core.plugins import Catalog, resolve
from miles_core.specs import EngineSpec, TrainerSpec

SECTIONS: Mapping[str, type[TrainerSpec] | type[EngineSpec]] = {"trainer": TrainerSpec, "engine": EngineSpec}
"""Section -> the kind of its component, for those that may take flags."""


@dataclass(frozen=True, kw_only=True)
class _Taker:
    """A component that takes flags, in its section. lacks: what has to be installed before it knows them."""

    section: str
    who: str
    flags: Flags
    lacks: MissingExtraError | None


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and what stood after `--`: the command line has taken the dashes away, and nothing else."""
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return list(words[:first]), list(words[first:])


def read_upstream(words: Sequence[str], doc: Node, catalog: Catalog) -> Node:
    """The layer that the flags make over the run `doc`, a later flag over an earlier one. Raises `UserError`."""
    layer = Node({}, "flags")
    if not words:
        return layer
    takers = list(_takers(doc, catalog))
    for name, given in _flags(words):
        origin = f"flag {' '.join([name, *given])}"
        taker, flag = _find(name, origin, takers)
        try:
            value = flag.read(given)
        except ValueError as error:
            raise UserError(f"{origin}: {error}") from error
        for place in flag.places:
            layer = merge(layer, written((taker.section, *place), value, origin))
    return layer


def _takers(doc: Node, catalog: Catalog) -> Iterator[_Taker]:
    for section, kind in SECTIONS.items():
        table = as_table(doc.value.get(section, Node({}, "default")))
        named = table.value.get("name") if isinstance(table.value, dict) else None
        if named is None or not isinstance(named.value, str):
            continue  # the section is built later, and says it better
        try:
            spec = catalog.get(kind, named.value).spec
        except UserError as error:
            raise error.placed(f"{named.origin}: {section}") from error.__cause__
        if spec.flags is not None:
            flags, lacks = _known(spec.flags)
            yield _Taker(section=section, who=f"{kind.kind} {spec.name!r}", flags=flags, lacks=lacks)


def _known(ref: str) -> tuple[Flags, MissingExtraError | None]:
    try:
        return resolve(ref)(), None
    except MissingExtraError as error:  # the flag may be another's
        return {}, error


def _flags(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words that follow it."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif not found or (word.startswith("-") and not re.fullmatch(r"-[\d.].*", word)):
            raise UserError(f"{word!r} after -- is no flag; flags there begin with two dashes")
        else:
            found[-1][1].append(word)
    yield from found


def _find(name: str, origin: str, takers: Sequence[_Taker]) -> tuple[_Taker, Flag]:
    """Whose flag it is. Raises `UserError` unless that is clear and it may be set."""
    if not takers:
        raise UserError(f"{origin}: neither the trainer nor the engine of this run takes flags after --")
    known = [(taker, taker.flags[name]) for taker in takers if name in taker.flags]
    free = [(taker, flag) for taker, flag in known if not flag.refusal]
    if len(free) == 1:
        return free[0]
    if free:
        ways = " or ".join(f"{dotted((taker.section, *flag.places[0]))}=…" for taker, flag in free)
        whose = " and of ".join(taker.who for taker, _ in free)
        raise UserError(f"{origin}: {name} is a flag of {whose}; before --, say {ways}")
    if lacks := next((taker.lacks for taker in takers if taker.lacks is not None), None):
        raise lacks.placed(origin) from lacks
    if known:
        reasons = "; ".join(f"{taker.who}: {flag.refusal}" for taker, flag in known)
        raise UserError(f"{origin}: {name} cannot be set. {reasons}")
    similar = close(name, {flag for taker in takers for flag in taker.flags})
    hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
    whose = " nor ".join(taker.who for taker in takers)
    who = f"neither {whose} has a flag" if len(takers) > 1 else f"{whose} has no flag"
    raise UserError(f"{origin}: {who} {name}.{hint}")
