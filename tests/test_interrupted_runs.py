"""A run that is interrupted in every way and resumed gives what an undisturbed one gives, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from run_kit import MODEL, Ended, Miles, apart_from_times

pytestmark = pytest.mark.slow

STAGES = (
    """
callbacks = ["probe"]
[data]
name = "jsonl"
path = "data.jsonl"
holdout = 0.2
[reward]
name = "even"
[sampling]
max_new_tokens = 8
[engine]
name = "torch"
count = 2
[trainer]
name = "torch"
ranks = 2
[trainer.optimizer]
learning_rate = 3e-3
[evaluation]
every = 2
prompts = 4
[checkpoint]
every = 1
keep = 2
[[stages]]
name = "warm-up"
schedule = { steps = 3, prompts_per_step = 8 }
rollout = "supervised"
loss = "sft"
[[stages]]
name = "grpo"
schedule = { steps = 4, prompts_per_step = 4, samples_per_prompt = 2, minibatches = 2, updates_per_batch = 2 }
advantage = "grpo"
loss = { name = "grpo", kl_coef = 0.1 }
"""
    + MODEL
)
"""Two stages, two engines, two trainer ranks, a reference, old log-probabilities and evaluations."""


@pytest.fixture(scope="module")
def miles(tmp_path_factory: pytest.TempPathFactory) -> Miles:
    made = Miles(tmp_path_factory.mktemp("interrupted"))
    (made.folder / "stages.toml").write_text(STAGES)
    return made


@pytest.fixture(scope="module")
def whole(miles: Miles) -> Ended:
    """A run that nobody disturbs."""
    return miles.run("train", "stages.toml", "name=whole")


def test_a_run_of_two_stages_engines_and_ranks(miles: Miles, whole: Ended) -> None:
    assert (whole.code, whole.err, whole.left_over) == (0, "", [])
    lines = miles.metrics("whole")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in lines if "eval/reward" in line] == [0, 2, 3, 4, 6, 7]
    for line in lines:
        if "loss" in line:  # supervised text was written by no engine, so there is nothing to compare
            assert ("mismatch/logprob_abs" in line) == ("staleness/max" in line) == (line["step"] > 3)
    assert [line["staleness/max"] for line in lines if "staleness/max" in line] == [0.0] * 4
    assert all(line["mismatch/logprob_abs"] < 1e-6 for line in lines if "mismatch/logprob_abs" in line)
    first = next(line for line in lines if line.get("step") == 4 and "loss" in line)
    assert first["kl"] > 0, "the second pass over the batch is away from the reference"
    folder = miles.folder / "runs/whole"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]
    assert [note["hook"] for note in miles.notes("ended")] == ["run_end"]


def test_the_finished_policy_generates_in_transformers(miles: Miles, whole: Ended) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = miles.folder / "runs/whole/policy"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    made = model.generate(**tokenizer("7 + 1 =", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert made.shape[1] > len("7 + 1 =")


def test_a_run_that_takes_turns_and_is_interrupted_in_every_way_gives_the_same_numbers(
    miles: Miles, whole: Ended, tmp_path: Path
) -> None:
    """Colocated: engines and trainer sleep in turns, and every engine gets its weights again after each sleep."""
    folder = miles.folder / "runs/cut"
    seen = len(miles.notes("paused"))

    def paused(*args: str, at: int, **how: Any) -> Any:
        process = miles.start(*args, probe={"pause": at}, **how)
        miles.wait_for_note("paused", process, step=at)
        return process

    # kill -9 of everything, between the two stages
    process = paused("train", "stages.toml", "name=cut", "placement.layout=colocated", at=3)
    assert len(miles.pids()) > 6
    miles.kill()
    assert process.wait() == -signal.SIGKILL
    assert (folder / "checkpoints/step-00000003").is_dir()

    # Ctrl-C in the second stage; resumed from another folder, although the data's path is relative
    process = paused("resume", str(folder), at=4, cwd=tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    miles.go_on(4)
    ended = miles.end(process)
    assert (ended.code, ended.left_over) == (130, [])
    assert f"interrupted; go on with: miles resume {folder}" in ended.out
    assert ended.err.strip() == "Error: interrupted"

    # asked to terminate, as by a batch system: all of its process group at once, which does not hear of Ctrl-C
    process = paused("resume", str(folder), at=5, background=True)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)
    miles.go_on(5)
    ended = miles.end(process)
    assert (ended.code, ended.left_over) == (130, [])
    assert f"interrupted; go on with: miles resume {folder}" in ended.out

    ended = miles.run("resume", str(folder))
    assert (ended.code, ended.err, ended.left_over) == (0, "", [])
    assert [note["step"] for note in miles.notes("paused")[seen:]] == [3, 4, 5]
    lines = miles.metrics("cut")
    assert all(line["seconds/turns"] > 0 for line in lines if "loss" in line)
    assert apart_from_times(lines) == apart_from_times(miles.metrics("whole"))
    for name in ("policy/model.safetensors", "checkpoints/step-00000007/trainer/optimizer-00000.safetensors"):
        assert (folder / name).read_bytes() == (miles.folder / "runs/whole" / name).read_bytes()
    table = ended.out.partition("held-out evaluation")[2]
    assert [line.split()[0] for line in table.splitlines()[2:8]] == ["0", "2", "3", "4", "6", "7"]

    again = miles.run("resume", str(folder))
    assert (again.code, again.out) == (2, "")
    assert "is finished: 7 of 7 steps" in again.err


def test_the_run_file_in_the_folder_starts_the_same_run(miles: Miles, whole: Ended) -> None:
    manifest = json.loads((miles.folder / "runs/whole/manifest.json").read_text())
    assert manifest["directory"] == str(miles.folder)
    assert ["miles-probe", "1.0", "miles_probe"] in manifest["plugins"]
