"""A time limit for code that is not ours: a plugin's module while it is imported, a component while it is checked."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 1.0
"""Seconds after which the limit strikes again, for code that catches everything and goes on."""


class TimeLimitError(BaseException):
    """The time is up. No `Exception`, so that `except Exception` in the code that hangs does not swallow it."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises `TimeLimitError` in the body once it has taken `seconds`; `what` says in the message who is late.

    Works by an alarm signal, so only in a process's main thread and where there are such signals; elsewhere the body
    runs without a limit. It stops everything that Python runs or that a signal wakes (sleep, locks, sockets), but not
    a C extension that never comes back. An alarm that was set before goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def strike(_number: int, _frame: FrameType | None) -> None:
        raise TimeLimitError(f"{what} takes more than {seconds:g} s")

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, strike)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)
