"""What a run does when something fails under it: it says what, where and how to go on, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import one_process
import pytest
from run_kit import RUN, Miles

pytestmark = pytest.mark.slow


@pytest.fixture
def miles(tmp_path: Path) -> Miles:
    return Miles(tmp_path)


FAST = (
    RUN.replace("steps = 4", "steps = 8\nmax_staleness = 2")
    .replace("samples_per_prompt = 2", "samples_per_prompt = 3")
    .replace('"torch"', '"torch"\ncount = 2', 1)
    .replace('"even"', '"patchy"')
)
"""Asynchronous, two engines, and a reward that is not a number for every first sample of a prompt."""


def test_a_full_disk_dead_engines_and_bad_rewards_cost_an_asynchronous_run_nothing_but_time(miles: Miles) -> None:
    path = miles.folder / "fast.toml"
    path.write_text(FAST)
    folder = miles.folder / "runs/fast"

    ended = miles.run("train", "fast.toml", "publish.mode=in-place", "checkpoint.every=2", probe={"full_disk": 4})
    assert (ended.code, ended.left_over) == (1, [])
    assert "step-00000004 could not be saved: trainer 0 cannot write" in ended.err
    assert "File too large" in ended.err
    assert f"The checkpoint of step 2 is whole; once that is mended, go on with: miles resume {folder}" in ended.err
    assert "Traceback" not in ended.err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]

    orders = {
        "pause": 4, "pause_step": 7, "starts": {"engine 1": 2},
        "dies_meeting": {"engine 0": 2}, "dies_receiving": {"engine 1": 2},
    }  # fmt: skip
    process = miles.start("resume", str(folder), probe=orders)
    for step, number in ((4, 0), (7, 1)):
        miles.wait_for_note("paused", process, step=step)
        engines = [note["pid"] for note in miles.notes("members") if note["role"] == f"engine {number}"]
        (folder / f"logs/engine-{number}.log").open("a").write(f"the last words of engine {number}\n")
        if number == 0:
            assert len(engines) == 3, "one of the run before, one that died meeting the trainer, and another"
            os.kill(engines[-1], signal.SIGKILL)
        else:
            (miles.folder / "die").touch()
        miles.go_on(step)
    ended = miles.end(process)
    assert (ended.code, ended.err, ended.left_over) == (0, "", [])
    assert not (miles.folder / "die").exists()
    assert ended.out.count("starting engine 0 again") == 2
    for number in (0, 1):
        assert f"engine {number} died" in ended.out
        assert f"the last lines of its log, {folder}/logs/engine-{number}.log:\n" in ended.out
        assert f"    the last words of engine {number}\nstarting engine {number} again\n" in ended.out
    assert "the probe does not let engine 1 start\ngoing on with 1 of 2 engines\n" in ended.out
    assert "the probe does not let engine 0 start" not in ended.out
    last = {note["step"]: note["groups"] for note in miles.notes("trained")}
    assert sorted(last) == list(range(8))
    assert sorted(group for groups in last.values() for group in groups) == list(range(32))
    lines = [line for line in miles.metrics("fast") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert max(line["staleness/max"] for line in lines) in (1.0, 2.0)
    assert sum(line["failed"] for line in lines) == 32, "one sample of each prompt"
    for line in lines:
        assert None not in line.values(), "a number that is not finite"
        assert 8 <= line["trained_tokens"] <= 2 * 4 * 8


@contextmanager
def cluster(environment: Mapping[str, str]) -> Iterator[str]:
    """The address of a Ray cluster that is there before the run and after it."""
    from ray.util import get_node_ip_address

    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--head", "--num-cpus=4", f"--port={port}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"{get_node_ip_address()}:{port}"
    finally:
        process.terminate()
        process.wait(30)


_ALIVE = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.cluster_resources()["CPU"] == ray.available_resources()["CPU"] == 4)
"""


def test_a_callback_that_raises_in_a_trainer_rank_ends_the_run_and_not_the_cluster(
    miles: Miles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    orders = {"raise": ["before_train_step"]}
    with cluster(miles.environment(orders)) as address:
        ended = miles.run("train", "run.toml", f"cluster.address={address}", "trainer.ranks=2", probe=orders)
        alive = subprocess.run([sys.executable, "-c", _ALIVE, address], capture_output=True, text=True, check=False)
    assert alive.stdout.strip() == "True", alive.stderr
    assert ended.code == 1
    trace, _, message = ended.err.rpartition("\nError: ")
    rank = message.split()[1]  # both raise; which is heard first is left open
    log = miles.folder / f"runs/run/logs/trainer-{rank}.log"
    reason = "ArithmeticError: the probe raises in before_train_step"
    assert message == f"trainer {rank} failed in update (log: {log}): {reason}\n"
    assert "Traceback (most recent call last):" in trace
    assert "in before_train_step\n" in trace
    assert "ray::" not in ended.err
    assert reason in log.read_text()


@pytest.fixture
def here(miles: Miles, monkeypatch: pytest.MonkeyPatch) -> Miles:
    """The folder is the current one, and the probe is installed in this process."""
    monkeypatch.chdir(miles.folder)
    monkeypatch.syspath_prepend(miles.folder / "site")
    monkeypatch.delitem(sys.modules, "miles_probe", raising=False)
    return miles


def test_a_callback_that_raises_in_the_driver_ends_the_run_and_cannot_hide_why(
    here: Miles, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in here.environment({"raise": ["step_end", "run_failed"]}).items():
        monkeypatch.setenv(name, value)
    assert one_process.command(monkeypatch, "train", "run.toml") == 1
    ended = capfd.readouterr()
    trace, _, message = ended.err.rpartition("\nError: ")
    assert message == (
        "the callback hook step_end failed in the driver: ArithmeticError: the probe raises in step_end\n"
    )
    assert "in step_end\n" in trace
    assert "the callback hook run_failed failed in the driver" in ended.out
    assert [note["hook"] for note in here.notes("ended")] == ["run_failed", "run_end"]
    assert here.notes("ended")[0]["error"] == message.strip()


def test_a_reward_that_always_raises_ends_the_run_with_its_traceback_and_no_callback_keeps_a_process(
    miles: Miles,
) -> None:
    with (miles.folder / "data.jsonl").open("a") as file:
        file.write('{"prompt": "the sum of one and one and one and one is?", "answer": 4}\n')
    ended = miles.run("train", "run.toml", "reward.name=broken", probe={"raise": ["run_failed"]})
    assert (ended.code, ended.left_over) == (1, [])
    assert ended.err.endswith(
        "Error: every sample of 4 groups in a row failed to be scored, the last one with: broken: "
        "LookupError: no such verifier\n"
    )
    assert 'raise LookupError("no such verifier")' in ended.err
    assert "the callback hook run_failed failed in the driver: ArithmeticError: the probe raises" in ended.out
    remark = r"^data\.jsonl: 1 of \d+ prompts are longer than the 39 tokens that fit \(.*\) and are left out$"
    assert re.search(remark, ended.out, re.MULTILINE)


def test_bad_data_ends_the_run_before_it_begins_and_leaves_no_folder(
    here: Miles, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with (here.folder / "data.jsonl").open("a") as file:
        file.write('{"prompt": "1 + 1 =", "answer": \n')
    for name, value in here.environment({}).items():
        monkeypatch.setenv(name, value)
    assert one_process.command(monkeypatch, "train", "run.toml") == 2
    _, _, message = capfd.readouterr().err.rpartition("Error: ")  # the collector's log stands before it here
    assert message.startswith("data.jsonl:41: not JSON: ")
    assert message.count("\n") == 1
    assert not (here.folder / "runs/run").exists()
