"""A whole run with the engine `sglang`: a real server of SGLang, without a GPU."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec

import pytest
from run_kit import RUN, Miles

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("sglang") is None, reason="sglang is not installed: nox -s sglang"),
]

SGLANG = RUN.replace('[engine]\nname = "torch"', '[engine]\nname = "sglang"\n[engine.server]\nmax_running_requests = 8')


@pytest.fixture(scope="module")
def miles(tmp_path_factory: pytest.TempPathFactory) -> Miles:
    made = Miles(tmp_path_factory.mktemp("sglang"))
    (made.folder / "sglang.toml").write_text(SGLANG)
    return made


def test_a_run_trains_publishes_and_leaves_nothing_behind(miles: Miles) -> None:
    whole = miles.run("train", "sglang.toml", "name=whole", "schedule.steps=3", "publish.mode=in-place")
    assert (whole.code, whole.left_over) == (0, []), whole.err
    # The server's log-probabilities are those of the trainer, so each version of the weights has arrived.
    worst = [
        value
        for line in miles.metrics("whole")
        for name, value in line.items()
        if name.endswith("mismatch/logprob_abs_max")
    ]
    assert len(worst) == 3
    assert max(worst) < 1e-4
    (log,) = (miles.folder / "runs" / "whole").rglob("sglang-0.log")
    assert "max_running_requests=8" in log.read_text()


def test_colocated_a_server_sleeps_while_megatron_trains_and_reads_its_weights(miles: Miles) -> None:
    colocated = ("placement.layout=colocated", "checkpoint.every=1", "publish.verify=checksum")
    megatron = ("trainer.name=megatron", "trainer.optimizer={lr=3e-3}")
    turns = miles.run("train", "sglang.toml", "name=turns", "schedule.steps=2", *colocated, *megatron)
    assert (turns.code, turns.left_over) == (0, []), turns.err
    lines = miles.metrics("turns")
    assert [line["seconds/turns"] > 0 for line in lines] == [True, True]
    assert max(line["mismatch/logprob_abs_max"] for line in lines) < 1e-4
    (log,) = (miles.folder / "runs" / "turns").rglob("sglang-0.log")
    assert "update_weights_from_tensor" in log.read_text()


def test_a_run_goes_on_with_the_other_server_when_one_is_killed(miles: Miles) -> None:
    process = miles.start(
        "train", "sglang.toml", "name=loses", "engine.count=2", "schedule.steps=4", probe={"pause_step": [2, 1.0]}
    )
    miles.wait_for_note("paused", process, step=2)
    os.kill(next(pid for pid, command in miles.pids().items() if "miles_sglang.serve" in command), signal.SIGKILL)
    ended = miles.end(process)
    assert (ended.code, ended.err, ended.left_over) == (0, "", [])
    assert "going on with 1 of 2 engines" in ended.out
    lines = [line for line in miles.metrics("loses") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert max(line["mismatch/logprob_abs_max"] for line in lines) < 1e-4  # it has had every version of the weights


def test_an_unknown_option_is_refused_before_anything_starts(miles: Miles) -> None:
    ended = miles.run("train", "sglang.toml", "name=wrong", "engine.server.mem_fraction_statik=0.8")
    assert ended.code == 2
    assert "Did you mean 'mem_fraction_static'" in ended.err
    assert not (miles.folder / "runs" / "wrong").exists()


def test_a_server_that_refuses_an_option_says_so_on_the_terminal(miles: Miles) -> None:
    ended = miles.run("train", "sglang.toml", "name=dies", "engine.server.attention_backend=none-such")
    assert (ended.code, ended.left_over) == (1, [])
    assert "the SGLang server ended with exit code" in ended.err
    assert "none-such" in ended.err
