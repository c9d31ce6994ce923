"""`miles train` and the signals that end it; what a run leaves behind then is tested by whole runs."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miles_core.cli import main, train
from miles_core.run import console, driver


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a run with a driver of the test tells; signals are as they were afterwards."""
    texts: list[str] = []
    shown = SimpleNamespace(start=lambda _: None, say=lambda text, _: texts.append(text), finish=lambda: None)
    monkeypatch.setattr(console, "Console", lambda plan: shown)
    before = signal.getsignal(signal.SIGHUP)
    yield texts
    signal.signal(signal.SIGHUP, before)


def run() -> None:
    plan: Any = SimpleNamespace(folder=Path("runs/mine"))
    train._run(plan, Path("model"), None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_being_told_to_end_lets_the_driver_end_its_processes(
    number: signal.Signals, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def drive(*_: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.sleep(60)
        finally:
            said.append("ended")

    monkeypatch.setattr(driver, "drive", drive)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert said == ["ended", "interrupted; go on with: miles resume runs/mine"]


def test_under_nohup_a_terminal_that_is_gone_does_not_matter(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def drive(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0)  # a signal is heard by now
        said.append("done")

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(driver, "drive", drive)
    run()
    assert said == ["done"]


def test_a_disk_that_is_full_needs_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(main.cli, "main", full)
    assert main.main(["resume", "runs/mine"]) == 1
    assert capsys.readouterr().err == "Error: cannot write metrics.jsonl: No space left on device\n"
