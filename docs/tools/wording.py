"""Markdown made of Python: signatures, docstrings, and what a docstring says of each field of a dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

LINE = 100
"""Longer signatures are broken, an argument a line."""


def code(text: str, language: str = "python", title: str = "") -> str:
    """A fenced block. title: shown above it."""
    heading = f' title="{title}"' if title else ""
    body = text.strip("\n")
    return f"```{language}{heading}\n{body}\n```\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown on one line."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """On one line; a bar in code needs no escape, and would show it."""
    parts = _QUOTED.split(" ".join(text.split()))
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in parts)


_QUOTED = re.compile(r"(`[^`]*`)")


def signature(function: Any, name: str = "") -> str:
    """`def name(arg: Type) -> Type`, exactly as it is written, without `self`."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    node.args.args = [argument for argument in node.args.args if argument.arg != "self"]
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = ast.unparse(node.args)
    text = f"{prefix} {name or node.name}({arguments}){returns}"
    if len(text) <= LINE:
        return text
    inner = "".join(f"    {argument},\n" for argument in _split(arguments))
    return f"{prefix} {name or node.name}(\n{inner}){returns}"


def _split(arguments: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def prose(text: str) -> str:
    """A docstring as Markdown: what would be HTML or emphasis outside of code is escaped, indented text is code."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(text).strip())
    return "\n\n".join(block if block.startswith("    ") else _escaped(block) for block in blocks) + "\n"


def _escaped(block: str) -> str:
    parts = _QUOTED.split(block)
    return "".join(
        part if part.startswith("`") else re.sub(r"([<*]|(?<!\w)_|_(?!\w))", r"\\\1", part) for part in parts
    )


def own_docstring(cls: type) -> str:
    """The docstring that was written for the class; "" if there is only what `dataclass` makes up."""
    found = vars(cls).get("__doc__") or ""
    return "" if found.startswith(f"{cls.__name__}(") else inspect.cleandoc(found)


def introduction(cls: type) -> str:
    """The part of a dataclass's docstring that describes no single field."""
    return "\n\n".join(text for text, _ in _paragraphs(cls) if text)


def description(cls: type, name: str) -> str:
    """What the docstrings of a dataclass and its bases say of a field: the text after "name:", else the sentences that
    name it. "" if there is none."""
    lineage = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    for base in lineage:
        for _, fields in _paragraphs(base):
            if name in fields:
                return fields[name]
    for base in lineage:
        sentences = re.split(r"(?<=\.)\s+", " ".join(own_docstring(base).split()))
        if said := " ".join(sentence for sentence in sentences if re.search(rf"\b{re.escape(name)}\b", sentence)):
            return said
    return ""


def _paragraphs(cls: type) -> list[tuple[str, dict[str, str]]]:
    """Of each paragraph of the docstring: the text before the first field, and field -> text."""
    names = "|".join(re.escape(field.name) for field in dataclasses.fields(cls))
    label = re.compile(rf"(?:^|(?<=[.;)] ))((?:{names})(?:(?:, | and )(?:{names}))*): ")
    found: list[tuple[str, dict[str, str]]] = []
    for block in re.split(r"\n\s*\n", own_docstring(cls)):
        if block.startswith("    "):  # a formula
            found.append((block, {}))
            continue
        text = " ".join(block.split())
        places = list(label.finditer(text)) if names else []
        fields = {
            name: text[place.end() : following.start() if following else len(text)].strip("; ")
            for place, following in zip_longest(places, places[1:])
            for name in re.split(r", | and ", place[1])
        }
        found.append((text[: places[0].start()].strip() if places else text, fields))
    return found
