"""For `pytest -p miles_core.testing.pytest_plugin`: tests that import PyTorch begin and end a third sooner."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from miles_core.lasting import lasting_imports


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collecting is where files of tests import what they need."""
    with lasting_imports():
        return (yield)
