"""Fake installed distributions, for tests of discovery and of the commands; the kits beside the tests importable."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Site:
    """A folder on sys.path with hand-made dist-info folders and modules."""

    folder: Path

    def install(
        self,
        name: str,
        body: str = "",
        *,
        version: str = "1.0",
        requires: str | None = ">=0.1",
        points: str | None = None,
        **modules: str,
    ) -> None:
        """A distribution whose module (its name with underscores) has `body`, after the usual imports.

        requires: its requirement on miles-core, None for none; points: the whole entry_points.txt; modules: more
        top-level modules and their text.
        """
        module = name.replace("-", "_")
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        requirement = "" if requires is None else f"Requires-Dist: miles-core{requires}\n"
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requirement}")
        (info / "entry_points.txt").write_text(points or f"[miles.plugins]\nentry = {module}\n")
        head = "from miles_core import *\nfrom miles_core import hookimpl\n"
        (self.folder / f"{module}.py").write_text(head + textwrap.dedent(body))
        for other, text in modules.items():
            (self.folder / f"{other}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    def run(self, *args: str, first: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """`miles ARGS` in a process of its own, with this folder on its path. first: code that runs before."""
        code = f"{first}import sys; from miles_core.cli.main import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", code, *args],
            env={**os.environ, "PYTHONPATH": str(self.folder), **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty folder that this process and `Site.run` import from; what came from it is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("MILES_DISABLE_PLUGINS", raising=False)
    yield Site(folder)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
