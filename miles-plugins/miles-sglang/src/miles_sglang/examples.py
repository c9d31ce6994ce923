"""Examples for the contract tests."""

from __future__ import annotations

from pathlib import Path

from miles_core.testing import Example


def weight_sync(folder: Path) -> Example:
    """The bytes go into a server's own process, where no made-up receiver can look at them."""
    return Example(skip="it sends into a server; the tests of miles-sglang show what arrives there")
