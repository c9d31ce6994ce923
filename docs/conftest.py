"""Makes what pages are made and checked with importable by their tests, and builds the site once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))

from commands import ROOT, Workshop

collect_ignore = ["examples"]  # packages with tests of their own, which need them installed: `nox -s package`


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Runs the pages of a test file."""
    return Workshop(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a link or an anchor that leads nowhere, or a page that no menu has, is an error.

    `nox -s docs` has built it so before, and says where it is (MILES_SITE).
    """
    if built := os.environ.get("MILES_SITE"):
        return Path(built)
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],  # --quiet would hide what is wrong
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
