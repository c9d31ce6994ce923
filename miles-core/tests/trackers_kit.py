"""Trackers with mistakes, in a module that another process can import too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


class Tracker:
    """A right one."""

    def __init__(self, options: Any, run: Any) -> None:
        self.file = run.folder / "seen"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.file.open("a") as file:
            file.write(f"{step} {sorted(metrics)}\n")

    def finish(self) -> None: ...


class Averaging(Tracker):
    """There is always a metric."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        sum(metrics.values()) / len(metrics)


class Reading(Tracker):
    """There is always a step."""

    def finish(self) -> None:
        self.file.read_text()


class Locking(Tracker):
    """There is always an end."""

    def __init__(self, options: Any, run: Any) -> None:
        super().__init__(options, run)
        (run.folder / "lock").touch(exist_ok=False)

    def finish(self) -> None:
        self.file.with_name("lock").unlink()


class Fragile(Tracker):
    """Works only in the process that made the first one."""

    maker = os.getpid()

    def __init__(self, options: Any, run: Any) -> None:
        super().__init__(options, run)
        made_by = run.folder / "process"
        if made_by.exists() and run.resumed is not None:
            assert made_by.read_text() == str(self.maker)
        made_by.write_text(str(self.maker))


class Strict(Tracker):
    """Hears of each step once."""

    def __init__(self, options: Any, run: Any) -> None:
        super().__init__(options, run)
        self.last = -1

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert step > self.last
        self.last = step


class Endless(Tracker):
    """Has no end."""

    finish = None  # type: ignore[assignment]
