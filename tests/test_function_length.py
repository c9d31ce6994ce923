"""No function is longer than a screen, so that each can be read as a whole.

An exception says so where it stands, in a comment on its `def` line: `# long: why it cannot be parted`.
Ruff holds the ceilings on branches and statements.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CEILING = 60
SOURCES = sorted(
    path.relative_to(ROOT)
    for pattern in ("miles-*/src/**/*.py", "miles-*/*/src/**/*.py", "benchmarks/*.py", "docs/**/*.py", "noxfile.py")
    for path in ROOT.glob(pattern)
)


def _verdicts(source: str) -> Iterator[str]:
    """What is wrong with the lengths of the functions in `source`."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            excused = re.search(r"# long: \w+", lines[node.lineno - 1]) is not None
            if length > CEILING and not excused:
                yield f"line {node.lineno}: {node.name} has {length} lines, more than {CEILING}"
            if length <= CEILING and excused:
                yield f"line {node.lineno}: {node.name} has {length} lines and needs no exception"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_functions_fit_a_screen(path: Path) -> None:
    assert list(_verdicts((ROOT / path).read_text())) == []


@pytest.mark.parametrize(
    ("comment", "statements", "right"),
    [
        ("", CEILING - 1, True),
        ("", CEILING, False),
        ("# long: one equation after the other", CEILING, True),
        ("# long:", CEILING, False),
        ("# long: once was", CEILING - 1, False),
    ],
)
def test_exceptions_have_a_reason_and_are_needed(comment: str, statements: int, right: bool) -> None:
    source = f"def f():  {comment}\n" + "    x = 1\n" * statements
    assert (list(_verdicts(source)) == []) is right
