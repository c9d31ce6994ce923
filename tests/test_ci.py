"""GitHub's CI runs what `nox` runs here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _default_sessions() -> set[str]:
    """The functions of the noxfile under `@nox.session` or `@nox.session(...)` without `default=False`."""
    functions = [
        node for node in ast.parse((ROOT / "noxfile.py").read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    decorators = {node.name: [ast.unparse(one) for one in node.decorator_list] for node in functions}
    return {
        name
        for name, texts in decorators.items()
        if any(text.startswith("nox.session") and "default=False" not in text for text in texts)
    }


def test_every_session_that_nox_runs_by_itself_is_a_job() -> None:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    (jobs,) = re.findall(r"^ +session: \[(.*)\]$", workflow, re.MULTILINE)
    assert set(jobs.split(", ")) == _default_sessions()
