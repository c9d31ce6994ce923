"""Whoever waits in code that is not Python's cannot be told that an engine has failed; so another thread looks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

WATCH_S = 1.0
"""How often is looked."""


@contextlib.contextmanager
def watching(engines: Sequence[Any], give_up: Callable[[], None]) -> Iterator[None]:
    """While the body works, looks on a thread of its own whether the engines, which are Ray's actors, can go on; calls
    `give_up` there, once, if one cannot."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_S):
            if _lost(engines):
                if not over.is_set():
                    give_up()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _lost(engines: Sequence[Any]) -> bool:
    """Whether one cannot go on. One that only does not answer is left to the deadlines."""
    asked = [engine.ping.remote() for engine in engines]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=WATCH_S)
    try:
        ray.get(answered)
    except RayError:
        return True
    return False
