"""A policy learns from a teacher that engines serve: whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import one_process
import pytest
from run_kit import Miles
from teacher_kit import RUN, save_teacher

from miles_core.config.estimate import estimate
from miles_core.config.layers import open_catalog
from miles_core.errors import RunError, UserError
from miles_core.plugins import discover
from miles_core.run.plan import make_plan

SAMPLED = '[advantage]\nname = "reverse-kl"\n[loss]\nname = "reinforce"\n'
TOP_K = '[loss]\nname = "distill"\ntop_k = 80\n'


@pytest.fixture
def miles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Miles:
    """A folder with data and a teacher, which is the current one."""
    monkeypatch.chdir(tmp_path)
    save_teacher(tmp_path / "teacher")
    return Miles(tmp_path)


def train(monkeypatch: pytest.MonkeyPatch, text: str, *flags: str) -> list[Any]:
    """The metrics of a run in this process."""
    Path("distil.toml").write_text(RUN + text)
    return one_process.train("distil.toml", flags, open_catalog("distil.toml", flags), monkeypatch)


def falls(steps: list[Any]) -> bool:
    """Whether the reverse KL falls to less than a third."""
    return bool(fmean(step["teacher_kl"] for step in steps[-3:]) < steps[0]["teacher_kl"] / 3)


STAGES = """
[[stages]]
name = "sampled"
advantage = "reverse-kl"
loss = "reinforce"
schedule = { steps = 7, prompts_per_step = 8, samples_per_prompt = 4 }
[[stages]]
name = "distributions"
loss = { name = "distill", top_k = 80 }
schedule = { steps = 7, prompts_per_step = 8, samples_per_prompt = 4 }
"""


@pytest.mark.slow
def test_a_student_distils_from_a_teacher(miles: Miles) -> None:
    """As a person starts it, by Ray, with two engines for the teacher: from sampled tokens, then from distributions."""
    (miles.folder / "distil.toml").write_text(RUN + STAGES)
    ended = miles.run("train", "distil.toml", "name=distil", "teacher.engine.count=2")
    assert (ended.code, ended.err, ended.left_over) == (0, "", [])
    steps = [line for line in miles.metrics("distil") if "loss" in line]
    assert fmean(step["teacher_kl"] for step in steps[5:8]) < 0.8 * steps[0]["teacher_kl"]
    assert falls(steps)
    assert all(step["seconds/teacher"] > 0 for step in steps)
    assert all(0.5 < step["teacher_mass"] <= 1 for step in steps[7:])
    assert {"teacher-0.log", "teacher-1.log"} <= {log.name for log in (miles.folder / "runs/distil/logs").iterdir()}


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (SAMPLED, ("loss.name=grpo", "schedule.minibatches=2", "advantage.recompute=true")),
        (SAMPLED, ("advantage.gamma=0.5", "schedule.max_staleness=2", 'corrections=["tis"]', "loss.name=grpo")),
        (TOP_K, ("loss.divergence=forward", "loss.tail=drop")),
        (TOP_K, ("loss.divergence=jsd", "schedule.updates_per_batch=2")),
        (TOP_K, ("sampling.temperature=0.8",)),
    ],
)
def test_every_way_of_it_teaches(
    miles: Miles, monkeypatch: pytest.MonkeyPatch, text: str, flags: tuple[str, ...]
) -> None:
    steps = train(monkeypatch, text, *flags)
    assert falls(steps)
    assert "reward" not in steps[0]


def test_the_recipe_teaches(miles: Miles, monkeypatch: pytest.MonkeyPatch) -> None:
    small = (
        "model.config={hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=2,head_dim=16}",
        "model.config.num_key_value_heads=1",
        "evaluation.every=0",
        "trackers=[]",
        "stages.warm-up.schedule={steps=1,prompts_per_step=2}",
        "stages.rl.schedule={steps=12,prompts_per_step=8,samples_per_prompt=4}",
        'stages.rl.trainer.optimizer={learning_rate=2e-2,schedule="constant",warmup_steps=0}',
        "teacher.path=teacher",
    )
    steps = one_process.train("arithmetic-distill", small, discover(), monkeypatch)
    assert falls(steps[1:])
    assert "reward" in steps[1]


def test_more_engines_say_the_same(miles: Miles, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (SAMPLED, TOP_K):
        one, three = (train(monkeypatch, text, "schedule.steps=2", f"teacher.engine.count={n}") for n in (1, 3))
        for name in ("loss", "grad_norm", "teacher_kl"):
            assert [step[name] for step in three] == pytest.approx([step[name] for step in one], rel=1e-4), name


def test_a_reward_may_be_watched_or_added(miles: Miles, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = '[reward]\nname = "number"\n'
    watched = train(monkeypatch, SAMPLED + reward, "schedule.steps=2")
    assert "reward" in watched[0]
    added = train(monkeypatch, SAMPLED + reward, "schedule.steps=2", "advantage.reward_coef=1.0")
    assert added[0]["teacher_kl"] == watched[0]["teacher_kl"]


def test_a_teacher_that_speaks_of_unknown_tokens_stops_the_run(miles: Miles, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree("teacher")
    save_teacher(Path("teacher"), vocab_size=200)  # as padded models have it, but with weights in the padding
    with pytest.raises(RunError, match=r"finds token \d+ likely in sample \d+/\d+, but the policy knows only 99"):
        train(monkeypatch, TOP_K)
    assert train(monkeypatch, SAMPLED, "schedule.steps=1")


def refusal(*flags: str) -> str:
    """What `miles plan` would say."""
    Path("distil.toml").write_text(RUN + SAMPLED)
    with pytest.raises(UserError) as refused:
        make_plan("distil.toml", flags, discover())
    return str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("teacher.path=nowhere",), "teacher.path 'nowhere' is no folder, and no hub name such as"),
        (("model.max_tokens=65",), "but the teacher's max_position_embeddings is 64; set model.max_tokens to 64"),
        (("loss=distill", "loss.top_k=100"), "100 likeliest tokens, but the teacher knows only 99; lower"),
        (("teacher.engine=none",), "unknown engine 'none'"),
        (("teacher.engine.gpus=-1",), "teacher.engine.gpus must not be negative"),
        (("teacher.engin=torch",), "teacher has no option 'engin'"),
        (("advantage.reward_coef=1.0",), "makes samples that must be scored, but there is no reward"),
        (("evaluation.every=1",), "makes samples that must be scored, but there is no reward"),
        (("reward=number", "advantage=grpo", "loss=grpo"), "there is a teacher, but nothing reads what it says"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(miles: Miles, flags: tuple[str, ...], message: str) -> None:
    assert message in refusal(*flags)


def test_a_folder_that_cannot_teach_the_policy_is_refused(miles: Miles) -> None:
    save_teacher(Path("other"), tokenizer="bytes")
    assert (
        "flag teacher.path=other: the teacher other cannot read the policy's tokens: 99 of 99 differ, such as 'Ċ', "
        "which is number 0 in the policy's tokenizer and has number 10 in the teacher's"
    ) in refusal("teacher.path=other")
    Path("teacher/model.safetensors").unlink()
    assert "teacher folder teacher has no weights (*.safetensors), so it has nothing to teach" in refusal()
    Path("teacher/config.json").unlink()
    assert "model folder teacher has no config.json" in refusal()


def test_a_teacher_on_the_hub_is_left_to_the_run(miles: Miles) -> None:
    Path("distil.toml").write_text(RUN + SAMPLED)
    plan = make_plan("distil.toml", ["teacher.path=org/nowhere", "teacher.engine.count=2"], discover())
    (teacher,) = [each for each in estimate(plan, discover()).processes if each.name == "teacher"]
    assert (teacher.count, teacher.memory) == (2, {})
    assert plan.origins["teacher.engine.count"] == "flag teacher.engine.count=2"
