"""SGLang's own command-line flags after `--`: each sets the field of `ServerArgs` that SGLang would set with it.

They are read from SGLang's source, as the fields are (`miles_sglang.surface`): to import it takes seconds and CUDA.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from miles_core.flags import Flag, from_parser
from miles_sglang import surface
from miles_sglang.surface import Declared

_UNITS = {"": 1} | {
    letter + unit: base**power
    for power, letter in enumerate("kMGT", 1)
    for unit, base in (("", 1000), ("i", 1024))
}  # fmt: skip


def flags() -> dict[str, Flag]:
    """All of them. See `miles_core.flags`. Raises `MissingExtraError` if SGLang is not installed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, declared in surface.declarations().items():
        own = declared.said("cli_name") or f"--{name.replace('_', '-')}"
        parser.add_argument(own, *(declared.said("aliases") or ()), dest=name, **_reading(declared))
    found = from_parser(parser, lambda action: surface.RESERVED.get(action.dest) or [("server", action.dest)])
    for name, instead in surface.old_flags().items():
        refusal = f"SGLang says {instead} instead" if instead else "it sets no field of ServerArgs"
        found.setdefault(name, Flag(read=lambda words: None, refusal=refusal))
    return found


def _reading(declared: Declared) -> dict[str, Any]:
    """What a parser has to know to read a value as SGLang's does."""
    action, reader = declared.source("action"), declared.source("type_parser")
    if action == "argparse.BooleanOptionalAction":
        return {"action": argparse.BooleanOptionalAction}
    if action:  # of its own: a list of adapters
        return {"nargs": "*", "type": _adapter}
    kind = surface.without_none(declared.type)
    if kind == "bool":
        return {"action": "store_true"}
    if reader:
        return {"type": _READERS.get(reader, str)}
    element = re.fullmatch(r"List\[(.*)\]", kind)
    count = declared.said("nargs") or ("+" if element else None)
    return {"type": _type(element[1] if element else kind), **({"nargs": count} if count else {}), **_const(declared)}


def _const(declared: Declared) -> dict[str, Any]:
    const = declared.said("const")
    return {} if const is None else {"const": const}


def _type(written: str) -> Callable[[str], Any]:
    """That of one word."""
    if re.fullmatch(r"Literal\[-?\d.*", written):
        return int
    return {"int": int, "float": float}.get(written, str)


def _number(word: str) -> int:
    """4096, 4k or 4Ki."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]i?)?", word)
    value = Decimal(match[1]) * _UNITS[match[2] or ""] if match else None
    if value is None or value != int(value):
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number")
    return int(value)


def _adapter(word: str) -> Any:
    """A path, or a table as JSON."""
    return json.loads(word) if word.startswith("{") else word


_READERS: Mapping[str, Callable[[str], Any]] = {
    "human_readable_int": _number,
    "json.loads": json.loads,
    "json_list_type": json.loads,
    "parse_cuda_graph_config_arg": json.loads,
}
"""SGLang's function for a value -> what does the same here; all others leave a word as it is."""
