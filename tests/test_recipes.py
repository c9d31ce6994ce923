"""Every recipe over `arithmetic` teaches: on a tiny model, with a reward that is quickly learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import one_process
import pytest

from miles_core.config.layers import recipe_text
from miles_core.plugins import Catalog, discover
from miles_core.run.plan import make_plan
from miles_core.specs import LossSpec, RecipeSpec, RewardSpec

BASE = "arithmetic"
STEPS = 12
SMALL = (
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=1",
    "model.config.head_dim=16",
    "evaluation.every=0",
    "trackers=[]",
    "reward.reasoning-gym.name=even",
    "stages.warm-up.schedule.steps=1",
    "stages.warm-up.schedule.prompts_per_step=2",
    f"stages.rl.schedule.steps={STEPS}",
    'stages.rl.trainer.optimizer={learning_rate=1e-2,schedule="constant",warmup_steps=0}',
)
"""What makes a recipe over `arithmetic` small."""

INSTALLED = discover()
RECIPES = [
    entry.spec.name
    for entry in INSTALLED.all(RecipeSpec)
    if entry.spec.name == BASE or (f'recipe = "{BASE}"' in recipe_text(entry) and "[teacher]" not in recipe_text(entry))
]
LOSSES = [entry.spec.name for entry in INSTALLED.all(LossSpec) if entry.plugin.name == "miles-grpo"]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    """What is installed, and a reward, which miles-core seems to offer."""
    even = RewardSpec(name="even", ref="one_process:Even", summary="The share of even letters.")
    return Catalog(
        tuple(
            replace(plugin, records=(*plugin.records, even)) if plugin.name == "miles-core" else plugin
            for plugin in INSTALLED.plugins
        )
    )


def learnt(
    recipe: str, flags: tuple[str, ...], catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> float:
    """By how much the reward of the last three steps is above that of the first three."""
    batch = make_plan(recipe, flags, catalog).stages[-1].schedule.prompts_per_step // 16
    flags = (*SMALL, *flags, f"stages.rl.schedule.prompts_per_step={batch}", f"folder={folder}")
    steps = one_process.train(recipe, flags, catalog, monkeypatch)
    rewards = [step["reward"] for step in steps if step["stage"] == 1]
    assert len(rewards) == STEPS
    return fmean(rewards[-3:]) - fmean(rewards[:3])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_teaches(recipe: str, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert learnt(recipe, (), catalog, tmp_path, monkeypatch) > 0.15


@pytest.mark.parametrize(
    "flags",
    [
        ('corrections=["icepop"]',),
        ('corrections=["mis"]',),
        ('corrections=["opsm"]',),
        ('corrections=["tis", "mis"]', "loss.old_policy=rollout", "schedule.updates_per_batch=2"),
        ("loss.old_policy=interpolate", "schedule.max_staleness=1"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_arithmetic_takes_corrections_and_other_old_policies(
    flags: tuple[str, ...], catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert learnt(BASE, tuple(f"stages.rl.{flag}" for flag in flags), catalog, tmp_path, monkeypatch) > 0.15


@pytest.mark.parametrize("loss", LOSSES)
def test_arithmetic_takes_any_loss_by_its_name(
    loss: str, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert learnt(BASE, (f"loss.name={loss}",), catalog, tmp_path, monkeypatch) > 0.15
