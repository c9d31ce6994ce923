"""Memory of a process that computes on a CPU."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of parameters in glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for the next allocation, up to 2 GiB of it, as far as pieces are below 32 MiB.

    A training step frees its activations at the end. Given back to the system, as glibc does by itself, they cost the
    next step a page fault for every 4 KiB.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
