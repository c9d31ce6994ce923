"""Imports that Python's garbage collector leaves alone.

PyTorch and transformers make a million objects that stay as long as the process. To look through them for garbage,
again and again while they are imported and several times at the end, takes a third of the time of a short process.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Collects no garbage in the body; if it imports something, nothing of what there is then is looked at again."""
    collecting, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if collecting:
            gc.enable()
