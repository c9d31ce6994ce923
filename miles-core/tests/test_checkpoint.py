"""Checkpoints are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from miles_core.errors import RunError, UserError
from miles_core.run import buffer, checkpoint
from miles_core.run.checkpoint import Checkpoint, Saving
from miles_core.run.folder import locked, removed_if_refused
from miles_core.run.trackers import forget_after, read_metrics
from miles_core.sample import Prompt, Sample


def save(run: Path, step: int, text: str = "whole", *, fails: BaseException | None = None) -> None:
    async def write() -> None:
        async with Saving(run, checkpoint.folder_of(run, step)) as folder:
            (folder / "trainer").mkdir()
            (folder / "trainer/weights").write_text(text)
            if fails:
                raise fails
            checkpoint.write_state(folder, {"step": step})

    asyncio.run(write())


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_appears_when_it_is_complete(tmp_path: Path) -> None:
    async def write() -> None:
        async with Saving(tmp_path, checkpoint.folder_of(tmp_path, 3)) as folder:
            (folder / "file").write_text("x")
            assert checkpoint.all_of(tmp_path) == []

    asyncio.run(write())
    assert checkpoint.all_of(tmp_path) == [Checkpoint(3, tmp_path / "checkpoints/step-00000003")]
    assert (tmp_path / "checkpoints/step-00000003/file").read_text() == "x"


_CRASH = """
import asyncio, os, signal, sys
from pathlib import Path
from miles_core.run import checkpoint

run, where = Path(sys.argv[1]), sys.argv[2]
if where == "before the rename":
    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

async def write():
    async with checkpoint.Saving(run, checkpoint.folder_of(run, 2)) as folder:
        (folder / "weights").write_text("half")
        if where == "while writing":
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(write())
"""


@pytest.mark.parametrize("where", ["while writing", "before the rename"])
def test_a_crash_leaves_the_checkpoint_before_it_and_the_next_one_cleans_up(tmp_path: Path, where: str) -> None:
    save(tmp_path, 1)
    crashed = subprocess.run([sys.executable, "-c", _CRASH, str(tmp_path), where], check=False, timeout=60)
    assert crashed.returncode == -signal.SIGKILL
    assert [one.step for one in checkpoint.all_of(tmp_path)] == [1]
    assert (tmp_path / "checkpoints/step-00000001/trainer/weights").read_text() == "whole"
    left, whole = names(tmp_path)
    assert re.fullmatch(r"\.step-00000002\.\w+\.incomplete", left)
    assert whole == "step-00000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights"), r"No space left on device \(weights\)"),
        (RunError("trainer 0 cannot write weights: No space left on device"), "trainer 0 cannot write weights: No sp"),
    ],
)
def test_a_full_disk_keeps_the_checkpoint_before_it_and_says_so(tmp_path: Path, error: Exception, reason: str) -> None:
    save(tmp_path, 4)
    with pytest.raises(RunError, match=rf"step-00000008 could not be saved: {reason}") as caught:
        save(tmp_path, 8, fails=error)
    mend = f"The checkpoint of step 4 is whole; once that is mended, go on with: miles resume {tmp_path}"
    assert caught.value.message.endswith(mend)
    assert names(tmp_path) == ["step-00000004"]


def test_a_folder_that_cannot_even_be_made_is_the_same_failure(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(RunError, match=r"step-00000001 could not be saved: .*\n.*There is no checkpoint yet"):
        save(tmp_path, 1)


def test_an_interruption_while_saving_stays_an_interruption(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(asyncio.CancelledError):
        save(tmp_path, 2, fails=asyncio.CancelledError())
    assert names(tmp_path) == ["step-00000001"]


def test_the_newest_are_kept_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (9, 10, 99, 100):
        save(tmp_path, step)
    checkpoint.keep_newest(tmp_path, 2)
    assert names(tmp_path) == ["step-00000099", "step-00000100"]
    checkpoint.keep_newest(tmp_path, 5)
    assert names(tmp_path) == ["step-00000099", "step-00000100"]


def test_a_damaged_checkpoint_says_how_to_go_on_without_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints/step-00000001/state.json").write_text("{")
    with pytest.raises(UserError, match=r"step-00000001 is damaged .*remove it to go on from the one before"):
        _ = checkpoint.all_of(tmp_path)[0].state


# ---- The buffer -----------------------------------------------------------------------------------------------------


def sample(group: int, index: int, prompt: int, response: int, *, experts: bool) -> Sample:
    rng = np.random.default_rng([group, index])
    shape = (prompt + response - 1, 2, 3)
    return Sample(
        group=group,
        index=index,
        prompt=rng.integers(0, 99, prompt).astype(np.int32),
        response=rng.integers(0, 99, response).astype(np.int32),
        mask=rng.random(response) < 0.5,
        logprobs=rng.normal(size=response).astype(np.float32),
        versions=rng.integers(-1, 5, response).astype(np.int32),
        status="truncated",
        text="é\ud800" if index else "",
        reward=0.1 + 0.2,
        rewards={"exact": 1 / 3},
        error=None if index else "late",
        answer=f"answer {group}",
        metadata={"set": {group}},
        routed_experts=rng.integers(0, 9, shape).astype(np.int32) if experts else None,
        baseline=index == 1,
    )


def prompt_of(group: int) -> Prompt:
    tokens = np.zeros(1, np.int32)
    return Prompt(id=group, tokens=tokens, text="", answer=f"answer {group}", metadata={"set": {group}})


def test_buffered_groups_come_back_as_they_were(tmp_path: Path) -> None:
    groups = {
        7: (2, [sample(7, 0, 3, 5, experts=False), sample(7, 1, 3, 0, experts=False)]),
        5: (0, [sample(5, 0, 1, 4, experts=True), sample(5, 1, 1, 2, experts=True)]),
    }
    buffer.save(tmp_path, {"position": 9, "again": [8]}, groups)
    state, loaded = buffer.load(tmp_path, prompt_of)
    assert state == {"position": 9, "again": [8]}
    assert list(loaded) == [7, 5]
    for group, (version, samples) in groups.items():
        assert loaded[group][0] == version
        for was, now in zip(samples, loaded[group][1], strict=True):
            for name, value in vars(was).items():
                if isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(getattr(now, name), value, strict=True)
                else:
                    assert getattr(now, name) == value


def test_an_empty_buffer_is_saved_too(tmp_path: Path) -> None:
    buffer.save(tmp_path, {"position": 4, "again": []}, {})
    assert buffer.load(tmp_path, prompt_of) == ({"position": 4, "again": []}, {})


# ---- The run folder -------------------------------------------------------------------------------------------------


def test_metrics_of_steps_that_are_done_again_are_forgotten(tmp_path: Path) -> None:
    lines = [{"step": step, "time": 1.5, "loss": step / 3} for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 5, "lo')
    forget_after(tmp_path, 3)
    assert list(read_metrics(tmp_path)) == [(step, {"loss": step / 3}) for step in range(4)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_two_processes_do_not_work_in_one_run_folder(tmp_path: Path) -> None:
    code = """import sys; from pathlib import Path; from miles_core.run.folder import locked
with locked(Path(sys.argv[1])): print("works")
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with locked(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"run {tmp_path} is going on in another process" in refused.stderr
    assert subprocess.run(command, check=False).returncode == 0


def test_a_folder_of_a_run_that_bad_input_ended_goes_unless_the_run_had_begun(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        with pytest.raises(UserError), removed_if_refused(folder):
            raise UserError("no such file")

    fresh, begun, saved, failed = (tmp_path / name for name in ("fresh", "begun", "saved", "failed"))
    for folder in (fresh, begun, saved, failed):
        folder.mkdir()
        (folder / "metrics.jsonl").touch()
    (begun / "metrics.jsonl").write_text("{}\n")
    save(saved, 1)
    for folder in (fresh, begun, saved):
        refuse(folder)
    with pytest.raises(RunError), removed_if_refused(failed):
        raise RunError("an engine died; see its log")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "failed", "saved"]
    shutil.rmtree(saved)
