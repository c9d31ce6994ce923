"""The model family of docs/examples, as somebody outside would write, install and use it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import one_process
import pytest

from miles_core.plugins import discover

NAME = "acme-gated-moe"
DOCS = Path(__file__).parents[1] / "docs"
EXAMPLE = DOCS / "examples" / NAME


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which it is installed, on the path of this process."""
    folder = tmp_path_factory.mktemp("site")
    how = ("--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "install", *how, str(EXAMPLE)], check=True)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def test_its_own_tests_pass(site: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no"]
    done = subprocess.run(
        command, cwd=EXAMPLE, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout


def test_its_run_trains_it(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert discover().plugin(NAME).status == "active"
    steps = one_process.train(str(EXAMPLE / "run.toml"), [], one_process.catalog(), monkeypatch)
    assert len(steps) == 2
    for step in steps:
        assert step["mismatch/logprob_abs_max"] < 1e-4


def test_the_page_about_it_shows_its_code() -> None:
    page = (DOCS / "how-to" / "write-a-model-family.md").read_text()
    shown = re.findall(r'^```python title="(src/[^"]+)"\n(.*?)^```$', page, re.MULTILINE | re.DOTALL)
    assert len(shown) == 4
    for file, code in shown:
        assert code in (EXAMPLE / file).read_text(), f"{file} has not what the page shows"
