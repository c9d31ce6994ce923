"""Makes the kit beside the tests importable, and starts the one server that they share."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sglang_kit import INSTALLED, REASON, SharedServer, left_over


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    """A server with the tiny model, whose weights every test publishes anew."""
    if not INSTALLED:
        pytest.skip(REASON)
    made = SharedServer(tmp_path_factory.mktemp("server"))
    asyncio.run(made.start())
    yield made
    assert len(left_over(made)) >= 3, "it has no scheduler and no detokenizer?"
    made.let_go()  # as if its owner had died
    assert left_over(made, patience_s=20) == []
    made.stop()
