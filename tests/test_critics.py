"""PPO with a critic, as a person starts it: on the policy's ranks or its own, warmed up, interrupted, resumed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import one_process
import pytest
from run_kit import MODEL, Ended, Miles, apart_from_times
from safetensors.torch import load_file

from miles_core.run import checkpoint

pytestmark = pytest.mark.slow

STAGES = (
    """
callbacks = ["probe"]
[data]
name = "jsonl"
path = "data.jsonl"
[reward]
name = "even"
[sampling]
max_new_tokens = 8
[engine]
name = "torch"
[trainer]
name = "torch"
ranks = 2
[trainer.optimizer]
learning_rate = 1e-3
[critic]
loss = "critic"
optimizer = { learning_rate = 3e-3 }
[checkpoint]
every = 1
keep = 9
[[stages]]
name = "warm-up"
schedule = { steps = 1, prompts_per_step = 8 }
rollout = "supervised"
loss = "sft"
[[stages]]
name = "ppo"
schedule = { steps = 6, prompts_per_step = 8, minibatches = 2 }
critic = { warmup_steps = 2 }
advantage = { name = "gae", kl_coef = 0.1 }
kl = { target = 0.5, horizon = 8 }
loss = "ppo"
"""
    + MODEL
)
"""A policy that has learnt before its critic begins, two ranks, two mini-batches, a reference and an adapted weight."""

LAST = "checkpoints/step-00000007"


@pytest.fixture(scope="module")
def miles(tmp_path_factory: pytest.TempPathFactory) -> Miles:
    made = Miles(tmp_path_factory.mktemp("critics"))
    (made.folder / "ppo.toml").write_text(STAGES)
    return made


@pytest.fixture(scope="module")
def shared(miles: Miles) -> Ended:
    """A run whose critic is on the policy's ranks."""
    return miles.run("train", "ppo.toml", "name=shared")


def files(folder: Path) -> dict[str, bytes]:
    """What a run leaves of policy and critic."""
    names = (
        "policy/model.safetensors",
        *(f"{LAST}/{part}/weights-00000.safetensors" for part in ("trainer", "critic")),
    )
    return {name: (folder / name).read_bytes() for name in (*names, f"{LAST}/critic/optimizer-00000.safetensors")}


def test_the_critic_learns_what_comes(miles: Miles, shared: Ended) -> None:
    assert (shared.code, shared.err, shared.left_over) == (0, "", [])
    lines = [line for line in miles.metrics("shared") if line.get("stage") == 1]
    assert [line["step"] for line in lines] == [2, 3, 4, 5, 6, 7]
    losses = [line["critic/value_loss"] for line in lines]
    assert sum(losses[3:]) < 0.7 * sum(losses[:3])
    assert all("loss" not in line and "critic/loss" in line for line in lines[:2])
    assert all("loss" in line and line["critic/learning_rate"] == 3e-3 for line in lines[2:])
    assert all(line["critic/explained_variance"] < 1 for line in lines)


def test_while_the_critic_warms_up_the_policy_stays_as_it_is_bit_for_bit(miles: Miles, shared: Ended) -> None:
    folder = miles.folder / "runs/shared/checkpoints"
    weights = [(folder / f"step-0000000{step}/trainer/weights-00000.safetensors").read_bytes() for step in range(1, 5)]
    assert weights[0] == weights[1] == weights[2]
    assert weights[2] != weights[3]


def test_the_critic_begins_as_the_policy_that_the_first_stage_has_taught(miles: Miles, shared: Ended) -> None:
    """An optimizer step moves a weight by little more than the learning rate."""
    folder = miles.folder / "runs/shared/checkpoints"
    policy = load_file(folder / "step-00000001/trainer/weights-00000.safetensors")
    critic = load_file(folder / "step-00000002/critic/weights-00000.safetensors")
    assert not (folder / "step-00000001/critic").exists()
    assert critic.keys() - policy.keys() == {"score.weight"}
    for name, tensor in policy.items():
        assert 0 < (critic[name] - tensor).abs().max() < 3 * 2 * 3e-3, name
    assert not (miles.folder / "runs/shared/.policy-for-critic").exists()


def test_the_weight_of_the_divergence_is_adapted(miles: Miles, shared: Ended) -> None:
    lines = [line for line in miles.metrics("shared") if line.get("stage") == 1]
    coefficient = 0.1
    for line in lines:
        assert line["kl_coef"] == pytest.approx(coefficient)
        error = min(max(line["kl_measured"] / 0.5 - 1, -0.2), 0.2)
        coefficient *= 1 + error * 8 / 8


def test_a_critic_on_ranks_of_its_own_gives_the_same_run_though_it_is_killed_and_resumed(
    miles: Miles, shared: Ended
) -> None:
    process = miles.start("train", "ppo.toml", "name=own", "critic.ranks=2", probe={"pause": 2})
    miles.wait_for_note("paused", process, step=2)
    miles.kill()
    assert process.wait() == -signal.SIGKILL
    folder = miles.folder / "runs/own"
    assert (folder / "logs/critic-1.log").exists()
    ended = miles.run("resume", str(folder))
    assert (ended.code, ended.err, ended.left_over) == (0, "", [])
    assert apart_from_times(miles.metrics("own")) == apart_from_times(miles.metrics("shared"))
    assert files(folder) == files(miles.folder / "runs/shared")


def test_from_every_checkpoint_a_run_with_a_critic_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the critic has begun, while it warms up, and while both learn; in one process and with one rank each."""
    rows = [json.dumps({"prompt": f"{number} + 1 =", "answer": number + 1}) for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "ppo.toml").write_text(STAGES.replace('callbacks = ["probe"]', ""))
    monkeypatch.chdir(tmp_path)
    whole, cut = tmp_path / "runs/whole", tmp_path / "runs/cut"
    flags = ["trainer.ranks=1", "name=whole"]
    expected = apart_from_times(one_process.train("ppo.toml", flags, one_process.catalog(), monkeypatch))
    for step in range(1, 7):
        shutil.copytree(whole, cut)
        for made in checkpoint.all_of(cut)[step:]:
            shutil.rmtree(made.folder)
        shutil.rmtree(cut / "policy")
        assert checkpoint.all_of(cut)[-1].step == step
        assert apart_from_times(one_process.resume(cut, one_process.catalog(), monkeypatch)) == expected
        assert files(cut) == files(whole)
        shutil.rmtree(cut)
