"""Drawing on a terminal without rich, for commands that must answer at once."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence

import click

Row = Sequence[str]


def table(
    header: Row, rows: Iterable[Row], *, indent: int = 0, styles: Mapping[int, Callable[[str], str]] | None = None
) -> None:
    """Prints left-aligned columns. On a terminal the last one is wrapped to its width; piped, a row is one line.

    styles: column -> what colours its cells, for columns before the last; the colours are dropped when piped.
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    start = indent + sum(widths) + 2 * len(widths)
    room = shutil.get_terminal_size().columns - start if sys.stdout.isatty() else 0
    for number, line in enumerate(lines):
        cells = [cell + " " * (width - len(cell)) for cell, width in zip(line[:-1], widths, strict=True)]
        for column, style in (styles or {}).items() if number else ():
            cells[column] = cells[column].replace(line[column], style(line[column]), 1)
        last = textwrap.wrap(line[-1], room) if room >= 20 else [line[-1]]
        click.echo(" " * indent + "  ".join([*cells, ("\n" + " " * start).join(last)]).rstrip())
