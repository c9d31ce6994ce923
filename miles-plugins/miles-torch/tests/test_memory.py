"""Freed memory stays in the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource
from miles_torch.memory import keep_freed_memory
{}
def use():  # 128 MiB in pieces of 16, then free again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [b"x" * 2**24 for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
use()
print(use())
"""


def faults(first: str) -> int:
    """Page faults of a process that uses as much memory as it has freed."""
    done = subprocess.run([sys.executable, "-c", _FAULTS.format(first)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    assert faults("keep_freed_memory()") < 0.1 * faults("")
