"""Makes the tools that the pages are made and checked with importable by their tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tools"))

collect_ignore = ["examples"]  # packages with tests of their own, which need them installed: `nox -s package`
