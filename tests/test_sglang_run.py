"""A whole run with the engine `sglang`: a real server of SGLang, without a GPU."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from run_kit import RUN, Miles

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("sglang") is None, reason="sglang is not installed: nox -s sglang"),
]

SGLANG = RUN.replace('[engine]\nname = "torch"', '[engine]\nname = "sglang"\n[engine.server]\nmax_running_requests = 8')


@pytest.fixture
def miles(tmp_path: Path) -> Miles:
    made = Miles(tmp_path, patience_s=600)
    (made.folder / "sglang.toml").write_text(SGLANG)
    return made


DEADLY = """
import itertools, os, signal
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
buckets = itertools.count(1)


def register():
    for method in ("_update_weights_from_flattened_bucket", "_update_bucketed_weights_from_distributed"):
        HookRegistry.register(f"{UPDATER}.{method}", die, HookType.BEFORE)


def die(*args, **named):
    order = os.path.join(os.environ["MILES_PROBE_FOLDER"], "die")
    if next(buckets) == 2 and os.path.exists(order):
        os.unlink(order)
        os.killpg(os.getpgrp(), signal.SIGKILL)
"""
"""A plugin of SGLang's own: a server dies when its second transfer reaches it, if it shall."""


def lose_two_servers(miles: Miles, *changes: str) -> None:
    """A whole run, which loses its only server after a step, and the next one while weights arrive."""
    info = miles.folder / "site" / "sglang_deadly-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-deadly\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\ndeadly = sglang_deadly:register\n")
    (miles.folder / "site" / "sglang_deadly.py").write_text(DEADLY)
    process = miles.start("train", "sglang.toml", *changes, probe={"pause_step": 1})
    miles.wait_for_note("paused", process, step=1)
    os.kill(next(pid for pid, command in miles.pids().items() if "miles_sglang.serve" in command), signal.SIGKILL)
    (miles.folder / "die").touch()  # the second transfer of the next server is that of step 2
    miles.go_on(1)
    ended = miles.end(process)
    assert (ended.code, ended.err, ended.left_over) == (0, "", [])
    assert ended.out.count("engine 0: the SGLang server ended with exit code -9 (log: ") == 2
    assert ended.out.count("starting engine 0 again") == 2
    assert not (miles.folder / "die").exists()


def mismatch(miles: Miles, name: str) -> list[float]:
    """The largest of each step. The server's log-probabilities are those of the trainer, if it has the weights."""
    return [line["mismatch/logprob_abs_max"] for line in miles.metrics(name) if "loss" in line]


def test_a_run_trains_publishes_outlives_its_servers_and_leaves_nothing_behind(miles: Miles) -> None:
    lose_two_servers(miles, "name=whole", "schedule.steps=3", "publish.mode=in-place")
    assert len(worst := mismatch(miles, "whole")) == 3
    assert max(worst) < 1e-4
    counted = [line for line in miles.metrics("whole") if "loss" in line]
    assert all(line["engine/prompt_tokens"] > line["engine/cached_tokens"] >= 0 for line in counted)
    assert all(line["engine/tokens_per_second"] > 0 for line in counted)
    explained = (Path(__file__).parents[1] / "docs" / "how-to" / "read-the-metrics.md").read_text()
    told = {name for line in counted for name in line if name.startswith("engine/")}
    assert [name for name in told if f"`{name}`" not in explained] == []
    (log,) = (miles.folder / "runs" / "whole").rglob("sglang-0.log")
    assert log.read_text().count("max_running_requests=8") >= 2


def test_colocated_a_server_sleeps_while_megatron_trains_and_reads_its_weights_and_so_do_others_after_its_end(
    miles: Miles,
) -> None:
    colocated = ("placement.layout=colocated", "publish.verify=checksum")
    megatron = ("trainer.name=megatron", "trainer.optimizer={lr=3e-3}")
    lose_two_servers(miles, "name=turns", "schedule.steps=2", *colocated, *megatron)
    assert [line["seconds/turns"] > 0 for line in miles.metrics("turns") if "loss" in line] == [True, True]
    assert max(mismatch(miles, "turns")) < 1e-4
    (log,) = (miles.folder / "runs" / "turns").rglob("sglang-0.log")
    assert "update_weights_from_tensor" in log.read_text()


def test_an_unknown_option_is_refused_before_anything_starts(miles: Miles) -> None:
    ended = miles.run("train", "sglang.toml", "name=wrong", "engine.server.mem_fraction_statik=0.8")
    assert ended.code == 2
    assert "Did you mean 'mem_fraction_static'" in ended.err
    assert not (miles.folder / "runs" / "wrong").exists()


def test_a_model_that_sglang_does_not_know_is_named_on_the_terminal_by_the_end_of_the_servers_log(miles: Miles) -> None:
    unknown = """engine.server.json_model_override_args='{"architectures": ["NoneSuchForCausalLM"]}'"""
    ended = miles.run("train", "sglang.toml", "name=dies", unknown)
    assert (ended.code, ended.left_over) == (1, [])
    assert "Error: engine 0: the SGLang server ended with exit code" in ended.err
    assert "NoneSuchForCausalLM" in ended.err
