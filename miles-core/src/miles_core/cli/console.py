"""Drawing on a terminal, without rich: light enough for commands that must answer at once."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence

import click

Row = Sequence[str]


def table(header: Row, rows: Iterable[Row], *, style: Callable[[str], str] = str) -> None:
    """Prints left-aligned columns. On a terminal the last one is wrapped to its width; piped, a row is one line.

    style: applied to each cell of the columns before the last, after alignment; the terminal's colours, if any.
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    indent = sum(widths) + 2 * len(widths)
    room = shutil.get_terminal_size().columns - indent if sys.stdout.isatty() else 0
    for line in lines:
        cells = [style(cell) + " " * (width - len(cell)) for cell, width in zip(line[:-1], widths, strict=True)]
        last = textwrap.wrap(line[-1], room) if room >= 20 else [line[-1]]
        click.echo("  ".join([*cells, ("\n" + " " * indent).join(last)]).rstrip())
