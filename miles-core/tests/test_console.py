"""What a run and its plan show on a terminal; what they print otherwise, the pages of the docs show."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miles_core.run.console import Console

COLOURS = {"36": "generate", "35": "reward", "34": "train", "33": "publish", "37": "other"}
SECONDS = {"generate": 0.8, "reward": 0.0, "train": 0.6, "publish": 0.2, "other": 0.4, "step": 2.0}
METRICS = {
    **{f"seconds/{name}": value for name, value in SECONDS.items()},
    "reward": 0.25, "loss": -0.125, "kl": 0.5, "mismatch/logprob_abs": 2e-7, "tokens_per_second": 1234.0,
    "grad_norm": 3.0,
}  # fmt: skip


def console(folder: Path) -> tuple[Console, Any]:
    stage = SimpleNamespace(name="rl", first_step=0, last_step=20)
    plan: Any = SimpleNamespace(steps=20, folder=folder, stage_of=lambda step: stage)
    return Console(plan), stage


def test_a_step_on_a_terminal_has_a_bar_of_where_its_time_went_and_the_stage_says_what_its_colours_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown, stage = console(tmp_path)
    shown.step(1, stage, METRICS)
    shown.step(20, stage, METRICS)
    heading, first, last = capsys.readouterr().out.splitlines()
    assert dict(re.findall(r"\x1b\[(\d+)m█ (\w+)\x1b", heading)) == COLOURS
    assert "rl" in heading
    for line, step in ((first, 1), (last, 20)):
        bar = {COLOURS[colour]: len(cells) for colour, cells in re.findall(r"\x1b\[(\d+)m(█+)\x1b", line)}
        assert bar == {"generate": 8, "train": 6, "publish": 2, "other": 4}
        assert re.sub(r"\x1b\[\d+m", "", line).partition("█")[0].split() == [
            "step", f"{step}/20", "reward", "0.250", "loss", "-0.1250", "kl", "0.5000", "mismatch", "2.0e-07",
            "tok/s", "1,234", "2.00", "s",
        ]  # fmt: skip


def test_piped_the_same_is_a_plain_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown, stage = console(tmp_path)
    shown.step(1, stage, METRICS)
    with shown.phase("evaluating"):
        pass
    heading, line = capsys.readouterr().out.splitlines()
    assert heading == "── rl ────────  steps 1–20"
    assert line.endswith("2.00 s  (generate 40%, train 30%, publish 10%, other 20%)")


def test_a_plan_on_a_terminal_has_every_value_and_its_origin(tmp_path: Path) -> None:
    """As a tree, which is the table of a pipe in other words."""
    pytest.importorskip("miles_grpo")
    command = [sys.executable, "-m", "miles_core", "plan", "arithmetic"]
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "160", "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    drawn = re.sub(r"\x1b\[[\d;]*m", "", _read(ours))
    assert process.wait() == 0
    values = [line.split() for line in piped.partition("Value ")[2].partition("\n\n")[0].splitlines()[1:]]
    assert len(values) > 100
    lines = iter(line.split() for line in drawn.partition("Value ")[2].splitlines())
    for name, *rest in values:  # in the same order, with headings between them
        assert [name.rpartition(".")[2], *rest] in lines, name


def _read(terminal: int) -> str:
    found = b""
    try:
        while part := os.read(terminal, 65536):
            found += part
    except OSError:  # the other side is closed
        pass
    os.close(terminal)
    return found.decode()
