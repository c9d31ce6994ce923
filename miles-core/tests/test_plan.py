"""Plans of made-up components. Everything in the catalog is named after the trait it shows."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import tomli_w
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_core import (
    AdvantageSpec,
    CallbackSpec,
    CorrectionSpec,
    DataSourceSpec,
    EngineSpec,
    FilterSpec,
    LossSpec,
    ModelSpec,
    RecipeSpec,
    RewardSpec,
    RolloutSpec,
    TrackerSpec,
    TrainerSpec,
    WeightSyncSpec,
)
from miles_core.cli.plan import _draw as draw_plan
from miles_core.cli.plan import plan as plan_command_of_miles
from miles_core.cli.recipes import recipes as recipes_command
from miles_core.config.estimate import estimate, readable
from miles_core.config.layers import open_catalog, read_run_file
from miles_core.config.model import family_of
from miles_core.config.schema import Plan
from miles_core.config.traits import loss_columns
from miles_core.errors import UserError
from miles_core.plugins import Catalog, Plugin
from miles_core.run.folder import claim, load_plan, write_run_files
from miles_core.run.model import prepare_model
from miles_core.run.plan import RUN_KEYS, STAGE_KEYS, make_plan


@dataclass(frozen=True, kw_only=True)
class Clipped:
    clip_high: float = 0.2
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.clip_high < 0:
            raise ValueError(f"clip_high must not be negative, got {self.clip_high}")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = 1e-6
    betas: tuple[float, ...] = (0.9, 0.95)
    schedule: Literal["constant", "cosine"] = "constant"


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    dtype: Literal["float32", "bfloat16"] = "float32"
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass(frozen=True, kw_only=True)
class Lines:
    path: str
    limit: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    threshold: float = 0.5


class TinyFamily:
    """parameters: vocabulary times width, and nothing else, so that tests can multiply by hand."""

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        known = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        made = {"vocab_size", "max_position_embeddings", "model_type"}
        for key in config:
            if key not in known and key not in made and not key.endswith("_token_id"):
                raise ValueError(f"{key} is not a field of a tiny config")
        return {**known, "architectures": ["TinyForCausalLM"], **config}

    def parameters(self, config: Mapping[str, Any]) -> int:
        return int(config["vocab_size"]) * int(config["hidden_size"])


def describe(config: Mapping[str, Any]) -> str:
    if config["num_attention_heads"] == 3:
        raise ValueError("three heads are not known to the trainer")
    return f"{config['num_hidden_layers']} layers"


def check_divides(
    options: TrainerOptions,
    config: Mapping[str, Any],
    description: Any,
    world_size: int,
    policy: TrainerOptions | None,
    folder: Path | None,
) -> None:
    if folder is not None:
        raise ValueError(f"{folder} holds what no trainer can read")
    if policy is not None and policy.dtype != options.dtype:
        raise ValueError(f"dtype is {options.dtype}, but the policy's on the same ranks is {policy.dtype}")
    layers = int(str(description).partition(" ")[0])
    if layers % world_size:
        raise ValueError(f"ranks: {description} cannot be divided by {world_size}")


def check_lines(options: Lines) -> None:
    if options.limit == 0:
        raise ValueError(f"data.limit leaves nothing of data.path {options.path}")
    if options.extra:
        raise ValueError("they are not what they seem")


fake = types.ModuleType("fake_options")
for item in (Clipped, Optimizer, TrainerOptions, Lines, Threshold, TinyFamily, describe, check_divides, check_lines):
    setattr(fake, item.__name__, item)
sys.modules["fake_options"] = fake


def _said(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "ref": "nowhere:thing", "summary": "It is made up.", **more}


def _plugin(name: str, *records: Any, version: str = "1.0", status: Any = "active") -> Plugin:
    entry = name.replace("-", "_")
    return Plugin(name=name, version=version, entry=entry, requires="", status=status, records=records)


ALGORITHMS = (
    AdvantageSpec(**_said("whitened", groups=True)),
    AdvantageSpec(**_said("critic", needs=frozenset({"values"}), gives=frozenset({"advantages", "returns"}))),
    LossSpec(
        **_said("clipped", options="fake_options:Clipped"),
        needs=frozenset({"advantages", "old_logprobs"}),
        needs_if={"ref_logprobs": "kl_coef"},
        kl_coef="kl_coef",
    ),
    AdvantageSpec(**_said("in-reward", options="fake_options:Clipped"), kl_coef="kl_coef"),
    AdvantageSpec(**_said("against-baseline", baseline=True)),
    CorrectionSpec(**_said("truncated", needs=frozenset({"staleness"}))),
    LossSpec(**_said("imitate")),
    LossSpec(**_said("value", needs=frozenset({"returns"}))),
    LossSpec(**_said("acting", trains="actor", needs=frozenset({"advantages"}))),
    LossSpec(
        **_said("squared", trains="critic", needs=frozenset({"returns", "values"}), options="fake_options:Threshold")
    ),
)
DATA = (
    DataSourceSpec(**_said("lines", options="fake_options:Lines", answers=True)),
    DataSourceSpec(**_said("open-ended")),
    RewardSpec(**_said("compare", needs_answer=True)),
    RewardSpec(**_said("judge")),
    FilterSpec(**_said("spread", options="fake_options:Threshold")),
    RolloutSpec(**_said("single-turn")),
    RolloutSpec(**_said("replay", engine=False)),
    RolloutSpec(**_said("with-baseline", baseline=True)),
)
STACK = (
    EngineSpec(**_said("quick", pause_modes=frozenset({"drain", "in-place"}))),
    EngineSpec(**_said("gpu-only", devices=frozenset({"cuda"}))),
    TrainerSpec(**_said("plain", options="fake_options:TrainerOptions", critic="nowhere:critic")),
    TrainerSpec(**_said("choosy", families="listed", devices=frozenset({"cpu"}))),
    TrainerSpec(**_said("island")),
    WeightSyncSpec(**_said("plain-to-quick"), trainer="plain", engine="quick", receiver="nowhere:receiver"),
    WeightSyncSpec(**_said("plain-to-gpu"), trainer="plain", engine="gpu-only", receiver="nowhere:receiver"),
    WeightSyncSpec(**_said("choosy-to-quick"), trainer="choosy", engine="quick", receiver="nowhere:receiver"),
    CallbackSpec(**_said("watch", runs_on=frozenset({"driver"}))),
    TrackerSpec(**_said("log-book")),
)
MODELS = (
    ModelSpec(name="tiny", ref="fake_options:TinyFamily", summary="A tiny model.", architectures=("TinyForCausalLM",)),
)


def catalog(*more: Plugin, **versions: str) -> Catalog:
    plugins = [
        _plugin("miles-core"),
        _plugin("fake-algorithms", *ALGORITHMS, version=versions.get("algorithms", "1.0")),
        _plugin("fake-data", *DATA),
        _plugin("fake-stack", *STACK),
        _plugin("fake-models", *MODELS),
        *more,
    ]
    return Catalog(tuple(sorted(plugins, key=lambda plugin: plugin.name)))


RUN = """\
[schedule]
steps = 3
prompts_per_step = 4
samples_per_prompt = 2
[sampling]
max_new_tokens = 16
[model]
family = "tiny"
max_tokens = 64
[data]
name = "lines"
path = "train.jsonl"
[reward]
name = "compare"
[engine]
name = "quick"
[trainer]
name = "plain"
[advantage]
name = "whitened"
[loss]
name = "clipped"
clip_high = 0.28
"""

STAGED = """\
name = "staged"
[sampling]
max_new_tokens = 16
[model]
family = "tiny"
max_tokens = 64
[data]
name = "lines"
path = "train.jsonl"
[reward]
name = "compare"
[engine]
name = "quick"
[trainer]
name = "plain"
optimizer = { learning_rate = 1e-5, schedule = "cosine" }
[advantage]
name = "whitened"
[loss]
name = "clipped"
clip_high = 0.28
[[stages]]
name = "warm-up"
rollout = { name = "replay" }
loss = { name = "imitate" }
schedule = { steps = 10, prompts_per_step = 8 }
trainer = { optimizer = { learning_rate = 1e-3 } }
[[stages]]
name = "rl"
schedule = { steps = 5, prompts_per_step = 4, samples_per_prompt = 4 }
"""


CRITIC = """\
[critic]
loss = "squared"
optimizer = { learning_rate = 0.5 }
"""

ACTING = CRITIC + RUN.replace('"whitened"', '"critic"').replace('"clipped"\nclip_high = 0.28', '"acting"')
"""With a critic on the policy's ranks."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan_of(text: str, *flags: str, plugins: Catalog | None = None) -> Plan:
    Path("run.toml").write_text(text)
    return make_plan("run.toml", flags, plugins or catalog())


def without(*sections: str) -> str:
    return "".join(f"[{part}" for part in RUN.split("[")[1:] if part.split("]")[0] not in sections)


def refusal(text: str, *flags: str, plugins: Catalog | None = None) -> str:
    with pytest.raises(UserError) as caught:
        plan_of(text, *flags, plugins=plugins)
    return str(caught.value)


def test_a_plain_run_is_one_stage() -> None:
    plan = plan_of(RUN)
    assert [stage.name for stage in plan.stages] == ["train"]
    assert plan.steps == 3
    assert plan.stages[0].loss.options == Clipped(clip_high=0.28)


def test_every_value_has_its_origin() -> None:
    plan = plan_of(RUN, "loss.kl_coef=0.0", "seed=7")
    assert plan.origins["loss.clip_high"] == "run.toml:23"
    assert plan.origins["loss.kl_coef"] == "flag loss.kl_coef=0.0"
    assert plan.origins["loss.aggregation"] == "default"
    assert plan.origins["rollout.name"] == "default"
    assert plan.values["schedule"] == {
        "steps": 3,
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "updates_per_batch": 1,
        "minibatches": 1,
        "max_staleness": 0,
        "over_sample": 0,
    }
    assert plan.values["cluster"]["address"] is None
    assert plan.seed == 7


def test_stages_lie_over_what_is_set_for_all() -> None:
    warm_up, rl = plan_of(STAGED).stages
    assert (warm_up.first_step, warm_up.last_step, rl.first_step, rl.last_step) == (0, 10, 10, 15)
    assert (warm_up.rollout.spec.name, rl.rollout.spec.name) == ("replay", "single-turn")
    assert (warm_up.loss.spec.name, rl.loss.spec.name) == ("imitate", "clipped")
    assert warm_up.loss.options is None
    assert rl.loss.options == Clipped(clip_high=0.28)
    assert warm_up.trainer.options == TrainerOptions(optimizer=Optimizer(learning_rate=1e-3, schedule="cosine"))
    assert rl.trainer.options == TrainerOptions(optimizer=Optimizer(learning_rate=1e-5, schedule="cosine"))
    assert warm_up.data == rl.data


def test_an_advantage_that_nothing_reads_is_left_out() -> None:
    warm_up, rl = plan_of(STAGED).stages
    assert warm_up.advantage is None
    assert rl.advantage is not None
    assert rl.advantage.spec.name == "whitened"


def test_a_stage_that_generates_nothing_has_nothing_to_correct() -> None:
    reweighted = _plugin("fake-corrections", CorrectionSpec(**_said("reweighted")))
    plan = plan_of(STAGED, 'corrections=["reweighted"]', plugins=catalog(reweighted))
    warm_up, rl = plan.stages
    assert warm_up.corrections == ()
    assert [one.spec.name for one in rl.corrections] == ["reweighted"]


@pytest.mark.parametrize(
    ("old_policy", "read"),
    [
        ("recompute", {"advantages", "old_logprobs"}),
        ("rollout", {"advantages", "rollout_logprobs"}),
        ("interpolate", {"advantages", "rollout_logprobs", "staleness"}),
    ],
)
def test_what_a_loss_reads_follows_from_its_old_policy(old_policy: str, read: set[str]) -> None:
    (stage,) = plan_of(RUN, f"loss.old_policy={old_policy}").stages
    assert loss_columns(stage) == read


def test_flags_reach_one_stage_by_its_name_and_all_stages_without() -> None:
    plan = plan_of(STAGED, "stages.rl.schedule.steps=50", "sampling.temperature=0.5")
    assert [stage.schedule.steps for stage in plan.stages] == [10, 50]
    assert [stage.sampling.temperature for stage in plan.stages] == [0.5, 0.5]
    assert plan.origins["stages.rl.schedule.steps"] == "flag stages.rl.schedule.steps=50"
    assert plan.origins["stages.rl.schedule.prompts_per_step"] == "run.toml:30"
    assert plan.origins["stages.warm-up.sampling.max_new_tokens"] == "run.toml:3"


@pytest.mark.parametrize("flag", ["reward.weight=2", "reward.0.weight=2", "reward.compare.weight=2"])
def test_a_single_reward_is_addressed_as_a_table_and_as_an_item(flag: str) -> None:
    ((reward, section),) = plan_of(RUN, flag).stages[0].rewards
    assert (reward.spec.name, section.weight) == ("compare", 2.0)


def test_several_rewards_have_weights_of_their_own() -> None:
    text = (
        RUN.replace('[reward]\nname = "compare"\n', "") + '[[reward]]\nname = "compare"\n[[reward]]\nname = "judge"\n'
    )
    rewards = plan_of(text, "reward.judge.weight=0.5", "reward.0.timeout_s=5").stages[0].rewards
    assert [(one.spec.name, part.weight, part.timeout_s) for one, part in rewards] == [
        ("compare", 1.0, 5.0),
        ("judge", 0.5, 30.0),
    ]


def test_lists_hold_names_and_tables() -> None:
    plan = plan_of(RUN, 'filters=["spread", {name="fake-data:spread", threshold=1}]', 'callbacks=["watch"]')
    assert [one.options for one in plan.stages[0].filters] == [Threshold(), Threshold(threshold=1.0)]
    assert plan.callbacks[0].spec.name == "watch"
    assert plan.origins["callbacks.0.name"] == 'flag callbacks=["watch"]'


def test_a_name_alone_is_short_for_a_table() -> None:
    assert plan_of(RUN, "reward=judge").stages[0].rewards[0][0].spec.name == "judge"


def test_the_plugin_set_is_what_the_run_uses() -> None:
    plan = plan_of(RUN, plugins=catalog(_plugin("fake-unused"), _plugin("fake-loss", LossSpec(**_said("other")))))
    assert plan.plugin_set == tuple(
        (name, "1.0", name.replace("-", "_"))
        for name in ("fake-algorithms", "fake-data", "fake-models", "fake-stack", "miles-core")
    )


def test_a_run_without_generation_needs_no_engine_advantage_or_reward() -> None:
    text = without("engine", "advantage", "reward", "loss")
    plan = plan_of(text, "rollout.name=replay", "loss.name=imitate")
    assert (plan.engine, plan.engine_section, plan.sync) == (None, None, None)
    assert plan.stages[0].rewards == ()
    assert plan.stages[0].advantage is None


def test_the_weight_sync_is_the_one_of_the_pair() -> None:
    sync = plan_of(RUN, "engine.name=gpu-only", "engine.gpus=1").sync
    assert sync is not None
    assert sync.spec.name == "plain-to-gpu"


def test_a_plan_goes_to_other_processes() -> None:
    plan = plan_of(STAGED)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_critic_takes_from_its_trainer_what_it_does_not_say() -> None:
    plan = plan_of(ACTING, "trainer.dtype=bfloat16", "trainer.optimizer.schedule=cosine")
    (stage,) = plan.stages
    assert plan.critic is not None
    assert plan.critic.spec is plan.trainer.spec
    assert plan.critic_section is not None
    assert plan.critic_section.shares
    assert stage.critic is not None
    expected = Optimizer(learning_rate=0.5, schedule="cosine")
    assert stage.critic.trainer.options == TrainerOptions(dtype="bfloat16", optimizer=expected)
    assert stage.critic.loss.options == Threshold()
    assert plan.origins["critic.optimizer.learning_rate"] == "run.toml:3"
    assert plan.origins["critic.optimizer.schedule"] == "flag trainer.optimizer.schedule=cosine"
    assert plan.values["critic"]["loss"] == {"name": "squared", "threshold": 0.5}


def test_a_critic_of_another_trainer_takes_nothing_and_needs_ranks() -> None:
    other = _plugin(
        "fake-other", TrainerSpec(**_said("other", critic="nowhere:x", options="fake_options:TrainerOptions"))
    )
    flags = ["critic.name=other", "trainer.dtype=bfloat16"]
    (stage,) = plan_of(ACTING, *flags, "critic.ranks=2", plugins=catalog(other)).stages
    assert stage.critic is not None
    assert stage.critic.trainer.options == TrainerOptions(optimizer=Optimizer(learning_rate=0.5))
    assert stage.critic.loss.spec.name == "squared"
    assert refusal(ACTING, *flags, plugins=catalog(other)).startswith(
        "flag critic.name=other: the critic's trainer is 'other' and the policy's 'plain', so they cannot share ranks"
    )


def test_only_stages_whose_advantage_reads_values_have_a_critic() -> None:
    text = STAGED.replace("[advantage]", CRITIC + "[advantage]").replace('"whitened"', '"critic"')
    flags = ["stages.rl.critic.warmup_steps=2", "stages.rl.critic.loss.threshold=0.25", "trainer.dtype=bfloat16"]
    warm_up, rl = plan_of(text, *flags).stages
    assert warm_up.critic is None
    assert rl.critic is not None
    assert (rl.warmup_steps, rl.critic.loss.options) == (2, Threshold(threshold=0.25))
    assert rl.critic.trainer.options.dtype == "bfloat16"
    assert "stages.rl.critic.ranks cannot be set" in refusal(text, "stages.rl.critic.ranks=2")
    assert "no effect" in refusal(text, "stages.warm-up.critic.warmup_steps=2")
    alone = ["loss=acting", "rollout=single-turn", "advantage=whitened", "schedule.samples_per_prompt=2"]
    assert (
        "loss 'acting' of stage 'warm-up' trains a policy beside a critic, but advantage 'whitened' reads no values; "
        "choose an advantage that reads them (critic), or a loss that needs no critic"
    ) in refusal(text, *(f"stages.warm-up.{flag}" for flag in alone))


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (
            RUN,
            ["loss.name=acting"],
            "flag loss.name=acting: loss 'acting' trains a policy beside a critic, but there is none; add [critic]",
        ),
        (
            ACTING,
            ["advantage.name=whitened"],
            "run.toml:1: there is a critic, but no advantage reads its values; remove [critic], or choose an advantage",
        ),
        (
            CRITIC + RUN,
            [],
            (
                "run.toml:1: there is a critic, but no advantage reads its values; remove [critic], or choose an "
                "advantage that reads them (critic)"
            ),
        ),
        (ACTING, ["loss.name=squared"], "flag loss.name=squared: loss 'squared' trains a critic and no policy"),
        (
            ACTING,
            ["critic.loss=acting"],
            "flag critic.loss=acting: critic.loss 'acting' trains a policy and no critic; say loss = \"squared\"",
        ),
        (
            ACTING,
            ["critic.warmup_steps=3"],
            "flag critic.warmup_steps=3: critic.warmup_steps is 3, which leaves the policy none of its 3 steps",
        ),
        (
            ACTING.replace("optimizer = { learning_rate = 0.5 }", ""),
            ["critic.name=choosy"],
            "flag critic.name=choosy: trainer 'choosy' has no critic; set critic.name to one that has: plain",
        ),
        (ACTING, ["critic.threads=2"], "flag critic.threads=2: critic.threads is for ranks of its own"),
        (ACTING, ["critic.gpus=1", "critic.ranks=1"], "flag critic.ranks=1: critic.ranks is for CPUs"),
        (ACTING.replace('loss = "squared"', ""), [], 'run.toml:1: critic has no loss; add loss = "squared"'),
    ],
)
def test_policy_and_critic_must_fit(text: str, flags: list[str], message: str) -> None:
    assert refusal(text, *flags).startswith(message)


def test_an_adapted_kl_coefficient_needs_one_to_begin_with() -> None:
    referee = TrainerSpec(**_said("referee"), gives=frozenset({"old_logprobs", "ref_logprobs"}))
    sync = WeightSyncSpec(**_said("referee-to-quick"), trainer="referee", engine="quick", receiver="nowhere:receiver")
    plugins = catalog(_plugin("fake-referee", referee, sync))

    def flags(*more: str) -> list[str]:
        return ["trainer.name=referee", "kl.target=6", *more]

    (stage,) = plan_of(RUN, *flags("loss.kl_coef=0.1", "kl.per=token"), plugins=plugins).stages
    assert (stage.kl.target, stage.kl.per) == (6.0, "token")
    assert refusal(RUN, *flags(), plugins=plugins).startswith(
        "flag kl.target=6: kl.target adapts the weight of the KL divergence to the reference, but there is none"
    )
    both = flags("loss.kl_coef=0.1", "advantage={name='in-reward', kl_coef=0.1}")
    assert "advantage.kl_coef and loss.kl_coef both weigh it; set one of them to 0" in refusal(
        RUN, *both, plugins=plugins
    )
    assert refusal(RUN, *flags("loss.kl_coef=0.1", "kl.horizon=7"), plugins=plugins).startswith(
        "flag kl.horizon=7: kl.horizon is 7, less than the 8 samples of a step"
    )


# ---- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("los.clip_high=1", "a run file has no key 'los'. Did you mean 'loss'?"),
        ("loss.clip_hi=1", "loss (loss 'clipped') has no option 'clip_hi'. Did you mean 'clip_high'?"),
        ("loss.agregation=token", "loss (loss 'clipped') has no option 'agregation'. Did you mean 'aggregation'"),
        ("loss.clip_high=high", 'loss.clip_high must be a number, got "high"'),
        ("loss.clip_high=-1", "loss.clip_high must not be negative, got -1.0"),
        ("loss.name=cliped", "loss: unknown loss 'cliped'. Did you mean 'clipped'?"),
        (
            "trainer.optimizer.learning_rat=1",
            "trainer.optimizer has no option 'learning_rat'. Did you mean 'learning_rate'?",
        ),
        ("schedule.steps=0", "schedule.steps must be at least 1, got 0"),
        ("schedule.stepz=5", "schedule has no option 'stepz'. Did you mean 'steps'?"),
        (
            "model.config.hidden_sizes=5",
            "[model.config] of family 'tiny': hidden_sizes is not a field of a tiny config",
        ),
        ("model.tokenizer=byte", "there is no tokenizer 'byte' to make for a new model. Did you mean 'bytes'?"),
        ("model.family=tin", "unknown model 'tin'. Did you mean 'tiny'?"),
        ("model.path=no/such/folder", "model.path 'no/such/folder' is no folder, and no hub name"),
        ("name=a/b", "name must be made of letters"),
        ("seed=-1", "seed must not be negative, and below 2^63, got -1"),
        ("seed=9223372036854775808", "seed must not be negative, and below 2^63, got 9223372036854775808"),
        ("reward.timeout_s=inf", "reward.0.timeout_s must be positive and at most 10000000, got inf"),
        ("reward.weight=-inf", "reward.0.weight must be finite, got -inf"),
        ("cluster.deadline_s=1e300", "cluster.deadline_s must be positive and at most 10000000, got 1e+300"),
        ("recipe=basic", "no flag chooses the recipe; name it in the place of run.toml, or in a run file"),
        ("xyz=1", f"a run file has no key 'xyz'. Known: {', '.join(sorted({*RUN_KEYS, *STAGE_KEYS}))}."),
        ("reward.name=comparer", "reward.0: unknown reward 'comparer'. Did you mean 'compare'?"),
        ("trackers.0.x=1", "trackers.0 must be a table with the name of a tracker; known: log-book"),
        ("stages=5", "stages must be tables that begin with [[stages]], at least one"),
        ("engine=5", "engine must be a table with the name of an engine; known: gpu-only, quick"),
    ],
)
def test_a_wrong_flag_is_refused_by_its_own_name(flag: str, message: str) -> None:
    assert refusal(RUN, flag).startswith(f"flag {flag}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            without("data"),
            "run.toml:1: there is no data; add [data] with the name of a data source; known: lines, open-ended",
        ),
        (
            without("trainer"),
            "run.toml:1: there is no trainer; add [trainer] with the name of a trainer; known: choosy, island, plain",
        ),
        (without("schedule"), "run.toml:1: schedule.steps is missing; it must be a whole number"),
        (without("model"), "run.toml:1: model: model needs either `path` or `family`, and not both"),
        (RUN.replace('path = "train.jsonl"', ""), "run.toml:10: data.path is missing; it must be a string"),
    ],
)
def test_what_is_missing_is_named(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["advantage.name=critic"],
            (
                "flag advantage.name=critic: advantage 'critic' needs values, which a critic gives, but there is none; "
                'add [critic] with loss = "squared"'
            ),
        ),
        (
            ["loss.name=value"],
            (
                "flag loss.name=value: loss 'value' needs returns, but advantage 'whitened' gives advantages, trainer "
                "'plain' gives old_logprobs; choose an advantage or a trainer that gives it"
            ),
        ),
        (
            ["loss.kl_coef=0.1"],
            (
                "run.toml:22: loss 'clipped' needs ref_logprobs, but advantage 'whitened' gives advantages, trainer "
                "'plain' gives old_logprobs; choose an advantage or a trainer that gives it, or switch off loss.kl_coef"
            ),
        ),
        (
            ['corrections=["truncated"]'],
            "flag corrections=[\"truncated\"]: correction 'truncated' needs staleness, but advantage",
        ),
        (
            ["schedule.samples_per_prompt=1"],
            (
                "flag schedule.samples_per_prompt=1: advantage 'whitened' compares the samples of one prompt, but "
                "schedule.samples_per_prompt is 1; set it to 2 or more"
            ),
        ),
        (
            ["rollout.name=with-baseline"],
            "run.toml:20: rollout 'with-baseline' makes a baseline sample, but advantage 'whitened' does not compare",
        ),
        (
            ["advantage.name=against-baseline"],
            (
                "flag advantage.name=against-baseline: advantage 'against-baseline' compares with a baseline sample, "
                "but rollout 'single-turn' makes none"
            ),
        ),
        (
            ["data.name=open-ended"],
            "run.toml:14: reward 'compare' compares with a reference answer, but data source 'open-ended' gives none",
        ),
        (
            ["reward=[]"],
            "flag reward=[]: rollout 'single-turn' makes samples that must be scored, but there is no reward",
        ),
        (
            ["sampling.max_new_tokens=64"],
            (
                "flag sampling.max_new_tokens=64: sampling.max_new_tokens is 64, which leaves no room for a prompt "
                "within model.max_tokens = 64"
            ),
        ),
        (
            ["trainer.name=island"],
            (
                "run.toml:16: no weight sync goes from trainer 'island' to engine 'quick'; installed pairs: choosy -> "
                "quick, plain -> gpu-only, plain -> quick."
            ),
        ),
        (
            ["publish.mode=retract"],
            "flag publish.mode=retract: publish.mode is 'retract', but engine 'quick' can only pause by drain",
        ),
        (
            ["engine.name=gpu-only"],
            "flag engine.name=gpu-only: engine 'gpu-only' runs on cuda, but engine.gpus is 0; set engine.gpus to 1",
        ),
        (
            ["trainer.name=choosy", "trainer.gpus=1"],
            "flag trainer.gpus=1: trainer 'choosy' runs on cpu, but trainer.gpus is 1; set trainer.gpus = 0",
        ),
        (
            ["model.config.max_position_embeddings=32"],
            "run.toml:9: model.max_tokens is 64, but the model's max_position_embeddings is 32",
        ),
        (
            ["plugins.disable=['fake-data']"],
            "flag plugins.disable=['fake-data']: plugin fake-data is disabled, but this run uses it",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_both_sides(flags: list[str], message: str) -> None:
    assert refusal(RUN, *flags).startswith(message)


def test_a_trainer_refuses_what_only_it_knows_and_a_family_what_it_cannot_describe() -> None:
    trainer = TrainerSpec(
        **_said("dividing", options="fake_options:TrainerOptions"), backend="iron", check="fake_options:check_divides"
    )
    sync = WeightSyncSpec(**_said("dividing-sync"), trainer="dividing", engine="quick", receiver="nowhere:receiver")
    flags = ("trainer.name=dividing", "model.family=fake-iron:tiny")
    described = ModelSpec(
        name="tiny",
        ref="fake_options:TinyFamily",
        summary="It.",
        architectures=("TinyForCausalLM",),
        backends={"iron": "fake_options:describe"},
    )
    able = catalog(_plugin("fake-iron", trainer, sync, described))
    assert plan_of(RUN, *flags, "trainer.ranks=2", plugins=able).trainer.spec == trainer
    assert refusal(RUN, *flags, "trainer.ranks=3", plugins=able) == (
        "flag trainer.ranks=3: ranks: 2 layers cannot be divided by 3"
    )
    assert refusal(RUN, *flags, "model.config.num_attention_heads=3", plugins=able) == (
        "flag model.family=fake-iron:tiny: model family 'tiny': three heads are not known to the trainer"
    )
    assert refusal(RUN, "trainer.name=dividing", plugins=catalog(_plugin("fake-iron", trainer, sync))) == (
        "run.toml:8: model family 'tiny' does not describe itself for 'iron', which trainer 'dividing' needs; "
        "families that do: none"
    )


def test_what_a_trainer_refuses_of_the_models_folder_is_said_where_the_folder_is_named() -> None:
    trainer = TrainerSpec(
        **_said("dividing", options="fake_options:TrainerOptions"), check="fake_options:check_divides"
    )
    sync = WeightSyncSpec(**_said("dividing-sync"), trainer="dividing", engine="quick", receiver="nowhere:receiver")
    able = catalog(_plugin("fake-iron", trainer, sync))
    model_folder("tokenizer.json", architectures=["TinyForCausalLM"])
    assert refusal(FOLDER_RUN, "trainer.name=dividing", plugins=able) == (
        "run.toml:8: model folder model holds what no trainer can read"
    )


def test_a_data_source_refuses_what_only_it_knows_with_the_line_of_the_option_that_it_names() -> None:
    lines = DataSourceSpec(
        **_said("seen", options="fake_options:Lines", answers=True), check="fake_options:check_lines"
    )
    plugins = catalog(_plugin("fake-seen", lines))
    run, staged = (text.replace('name = "lines"', 'name = "seen"') for text in (RUN, STAGED))
    assert plan_of(run, plugins=plugins).stages[0].data.spec == lines
    limit = "data.limit leaves nothing of data.path train.jsonl"
    assert refusal(run.replace('"seen"', '"seen"\nlimit = 0'), plugins=plugins) == f"run.toml:12: {limit}"
    assert refusal(run, "data.limit=0", plugins=plugins) == f"flag data.limit=0: {limit}"
    assert refusal(run, "data.extra.x=1", plugins=plugins) == "run.toml:11: they are not what they seem"
    flag = "stages.rl.data.limit=0"
    assert refusal(staged, flag, plugins=plugins) == f"flag {flag}: {limit}"


def test_a_trainer_refuses_a_critic_by_its_own_ranks_and_beside_its_policy() -> None:
    trainer = TrainerSpec(
        **_said("dividing", options="fake_options:TrainerOptions", critic="nowhere:critic"),
        check="fake_options:check_divides",
        backend="iron",
    )
    sync = WeightSyncSpec(**_said("dividing-sync"), trainer="dividing", engine="quick", receiver="nowhere:receiver")
    described = ModelSpec(
        **_said("tiny") | {"ref": "fake_options:TinyFamily"},
        architectures=("TinyForCausalLM",),
        backends={"iron": "fake_options:describe"},
    )
    flags = ("trainer.name=dividing", "model.family=fake-iron:tiny")
    able = catalog(_plugin("fake-iron", trainer, sync, described))
    assert refusal(ACTING, *flags, "critic.ranks=3", plugins=able) == (
        "flag critic.ranks=3: of the critic: ranks: 2 layers cannot be divided by 3"
    )
    other = "critic.dtype=bfloat16"
    assert refusal(ACTING, *flags, other, plugins=able) == (
        "flag critic.dtype=bfloat16: of the critic: dtype is bfloat16, but the policy's on the same ranks is float32"
    )
    assert plan_of(ACTING, *flags, other, "critic.ranks=1", plugins=able).critic is not None


def test_an_engine_is_asked_for_when_something_generates() -> None:
    assert "rollout 'single-turn' generates, but there is no engine" in refusal(without("engine"))


def test_an_advantage_is_asked_for_when_the_loss_needs_one() -> None:
    assert refusal(without("advantage")).startswith(
        "run.toml:20: loss 'clipped' needs advantages, but there is no advantage, trainer 'plain' gives old_logprobs"
    )


def test_evaluation_needs_something_that_generates() -> None:
    flags = ["rollout.name=replay", "loss.name=imitate", "evaluation.every=2"]
    assert "evaluation needs a rollout that generates, but no stage has one ('replay')" in refusal(RUN, *flags)


def test_the_stage_is_named_where_there_are_several() -> None:
    message = refusal(STAGED, "stages.rl.schedule.samples_per_prompt=1")
    assert "advantage 'whitened' of stage 'rl' compares" in message


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("stages.rl.engine.gpus=1", "stages.rl.engine cannot be set: engine is the same for all stages"),
        ("stages.rl.trainer.gpus=1", "stages.rl.trainer.gpus cannot be set: it is the same for all stages"),
        ("stages.rl.los=1", "stages.rl has no key 'los'. Did you mean 'loss'?"),
        ("stages.rl.trainer=fast", 'stages.rl.trainer must be a table, got "fast"'),
        ("stages.rl.loss.clip_hi=1", "stages.rl.loss (loss 'clipped') has no option 'clip_hi'"),
        ("stages.rl.name=warm-up", "there is a stage 'warm-up' already"),
        ("stages.rl.name=3", "a stage needs a name that begins with a letter"),
    ],
)
def test_a_stage_is_held_to_what_stages_may_set(flag: str, message: str) -> None:
    assert message in refusal(STAGED, flag)


def test_a_flag_that_every_stage_hides_is_refused() -> None:
    assert refusal(STAGED, "schedule.steps=7") == (
        "flag schedule.steps=7: schedule.steps has no effect: no stage uses it; say stages.warm-up.schedule.steps or "
        "stages.rl.schedule.steps"
    )
    assert "advantage.name has no effect" in refusal(RUN, "loss.name=imitate", "advantage.name=critic")


def test_options_are_refused_where_there_are_none() -> None:
    assert "trainer (trainer 'island') has no option 'lr'" in refusal(RUN, "trainer.name=island", "trainer.lr=1")
    staged = STAGED.replace('name = "plain"', 'name = "choosy"').replace("\noptimizer = {", "\n# {")
    assert "stages.warm-up.trainer has no option 'optimizer'" in refusal(staged)


# ---- Models -------------------------------------------------------------------------------------------------------


def model_folder(*files: str, **config: Any) -> None:
    folder = Path("model")
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    if config:
        (folder / "config.json").write_text(json.dumps(config))


FOLDER_RUN = RUN.replace('family = "tiny"', 'path = "./model"')


def test_a_model_folder_is_found_with_its_family() -> None:
    model_folder("tokenizer.json", architectures=["TinyForCausalLM"], max_position_embeddings=64)
    assert ("fake-models", "1.0", "fake_models") in plan_of(FOLDER_RUN).plugin_set
    assert plan_of(FOLDER_RUN, "trainer.name=choosy").trainer.spec.name == "choosy"


@pytest.mark.parametrize(("chosen", "plugin"), [("other-models:other", "other-models"), ("tiny", "fake-models")])
def test_the_family_that_a_run_chooses_is_that_of_all_who_read_its_config(chosen: str, plugin: str) -> None:
    again = dataclasses.replace(MODELS[0], name="other", model_types=("small",))
    plugins = catalog(_plugin("other-models", again))
    plan = plan_of(RUN, f"model.family={chosen}", "model.config.model_type=small", plugins=plugins)
    assert (plugin, "1.0", plugin.replace("-", "_")) in plan.plugin_set
    Path("new").mkdir()
    config = json.loads((prepare_model(plan.model, TinyFamily(), Path("new")) / "config.json").read_text())
    found = family_of(config, plugins)
    assert found is not None
    assert found.plugin.name == plugin
    without = family_of({**config, "miles_family": "gone"}, plugins)
    assert without is not None
    assert without.spec.name == "other"  # as if nothing had been chosen


def test_a_family_that_does_not_cover_its_own_model_is_refused() -> None:
    other = dataclasses.replace(MODELS[0], name="other", architectures=("OtherForCausalLM",))
    assert refusal(RUN, "model.family=other", plugins=catalog(_plugin("other-models", other))) == (
        "flag model.family=other: model family 'other' covers OtherForCausalLM, and its new model is TinyForCausalLM; "
        "no process of the run would know it by its config.json"
    )


def test_several_families_of_one_architecture_are_not_chosen_between() -> None:
    model_folder("tokenizer.json", architectures=["TinyForCausalLM"], model_type="tiny")
    again = dataclasses.replace(MODELS[0], name="other")
    assert refusal(FOLDER_RUN, plugins=catalog(_plugin("other-models", again))) == (
        "run.toml:8: 2 installed model families cover TinyForCausalLM: other-models:other and fake-models:tiny. "
        'Keep one and disable the others\' plugins, as in plugins.disable = ["fake-models"]'
    )
    own = dataclasses.replace(again, model_types=("tiny",))
    assert ("other-models", "1.0", "other_models") in plan_of(
        FOLDER_RUN, plugins=catalog(_plugin("other-models", own))
    ).plugin_set


def test_a_hub_name_is_left_to_the_run() -> None:
    assert plan_of(RUN, "model.path=nobody/has-this-model").model.path == "nobody/has-this-model"


@pytest.mark.parametrize(
    ("files", "config", "message"),
    [
        ((), {}, "run.toml:8: model.path './model' is no folder"),
        (("tokenizer.json",), {}, "run.toml:8: model folder model has no config.json, so it is no Hugging Face model"),
        ((), {"hidden_size": 8}, "run.toml:8: model folder model has no tokenizer (none of tokenizer.json, "),
        (
            ("tokenizer.json",),
            {"max_position_embeddings": 32, "architectures": ["TinyForCausalLM"]},
            "run.toml:9: model.max_tokens is 64, but the model's max_position_embeddings is 32; set model.max_tokens",
        ),
        (
            ("tokenizer.json",),
            {"architectures": ["OddForCausalLM"]},
            (
                "run.toml:8: trainer 'choosy' trains only models that a plugin describes; no installed model family "
                "covers OddForCausalLM. Installed: tiny (TinyForCausalLM). To write one: docs/how-to/"
            ),
        ),
    ],
)
def test_an_unusable_model_folder_is_refused(files: tuple[str, ...], config: dict[str, Any], message: str) -> None:
    if files or config:
        model_folder(*files, **config)
    assert refusal(FOLDER_RUN, "trainer.name=choosy").startswith(message)


def test_where_a_family_or_a_weight_sync_is_missing_plugins_that_are_not_loaded_are_named() -> None:
    lost = dataclasses.replace(_plugin("fake-lost", status="failed"), reason="ImportError: libfake.so")
    idle = "\nPlugins that are not loaded:\n  fake-lost: failed, ImportError: libfake.so"
    assert refusal(RUN, "trainer.name=island", plugins=catalog(lost)).endswith(idle)
    model_folder("tokenizer.json", architectures=["OddForCausalLM"])
    assert refusal(FOLDER_RUN, "trainer.name=choosy", plugins=catalog(lost)).endswith(idle)


@pytest.mark.parametrize("flag", ["model.config.hidden_size=8", "model.tokenizer=ascii"])
def test_what_describes_a_new_model_is_refused_for_one_that_is_there(flag: str) -> None:
    model_folder("tokenizer.json", architectures=["TinyForCausalLM"])
    key = flag.split(".")[1].partition("=")[0]
    assert refusal(FOLDER_RUN, flag) == (
        f"flag {flag}: model.{key} is for a new model, one of a family; the folder of model.path has its own"
    )
    assert plan_of(RUN, "model.tokenizer=ascii", "model.path=model").model.tokenizer == "bytes"


def test_a_broken_config_is_refused() -> None:
    model_folder("tokenizer.json", "config.json")
    Path("model/config.json").write_text("{,}")
    assert "config.json cannot be read" in refusal(FOLDER_RUN)


# ---- Files and recipes --------------------------------------------------------------------------------------------


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalog]:
    """A plugin with the recipes `basic`, `derived` (from basic), `circle-a` and `circle-b`, and `demanding`."""
    package = tmp_path / "site" / "fake_recipes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    files = {
        "basic": RUN,
        "derived": 'recipe = "basic"\nseed = 5\n[loss]\nclip_high = 0.4\n',
        "staged": STAGED,
        "circle-a": 'recipe = "circle-b"\n',
        "circle-b": 'recipe = "circle-a"\n',
        "broken": "a = \n",
    }
    for name, text in files.items():
        (package / f"{name}.toml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    specs = [RecipeSpec(name=name, ref=f"fake_recipes:{name}.toml", summary="A recipe.") for name in files]
    specs.append(
        RecipeSpec(name="absent", ref="fake_recipes:absent.toml", summary="Its plugin forgot the file."),
    )
    needs = [("newer", "pytest>=9999"), ("lacking", "no-such-distribution>=1"), ("elsewhere", "x; python_version<'3'")]
    for name, requirement in needs:
        specs.append(RecipeSpec(name=name, ref="fake_recipes:basic.toml", summary="A recipe.", requires=(requirement,)))
    yield catalog(_plugin("fake-recipes", *specs))
    sys.modules.pop("fake_recipes", None)


def test_a_recipe_is_a_run(recipes: Catalog) -> None:
    plan = make_plan("basic", ["loss.kl_coef=0"], recipes)
    assert plan.name == "basic"
    assert plan.origins["loss.clip_high"] == "recipe basic, line 23"


def test_recipe_run_file_and_flags_lie_over_one_another(recipes: Catalog) -> None:
    plan = plan_of('recipe = "derived"\nseed = 6\n[loss]\nkl_coef = 0.0\n', "schedule.steps=9", plugins=recipes)
    assert plan.name == "run"
    assert plan.stages[0].loss.options == Clipped(clip_high=0.4)
    assert [
        plan.origins[name] for name in ("loss.name", "loss.clip_high", "loss.kl_coef", "schedule.steps", "seed")
    ] == [
        "recipe basic, line 22",
        "recipe derived, line 4",
        "run.toml:4",
        "flag schedule.steps=9",
        "run.toml:2",
    ]


def test_a_line_of_a_run_file_that_its_recipe_hides_is_refused(recipes: Catalog) -> None:
    message = refusal('recipe = "staged"\n[schedule]\nsteps = 4\n', plugins=recipes)
    assert message.startswith("run.toml:3: schedule.steps has no effect: no stage uses it; say stages.warm-up.")
    plan = plan_of('recipe = "staged"\n[stages.rl.schedule]\nsteps = 4\n', plugins=recipes)
    assert plan.stages[1].schedule.steps == 4


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("basik", "unknown recipe 'basik'. Did you mean 'basic'?"),
        ("absent.toml", "there is no run file absent.toml"),
        ("./", ". is a folder, not a run file"),
        ("plain-file", "unknown recipe 'plain-file'. Known: "),
        ("circle-a", "recipe 'circle-a' builds on itself: circle-a -> circle-b -> circle-a"),
        ("broken", "recipe broken, line 1: this is not valid TOML"),
        ("absent", "recipe 'absent' of plugin fake-recipes cannot be read"),
        ("newer", "recipe 'newer' needs pytest>=9999, and "),
        ("lacking", "recipe 'lacking' needs no-such-distribution>=1, which is not installed; pip install '"),
    ],
)
def test_a_target_that_is_no_run_is_refused(recipes: Catalog, target: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(target, [], recipes)
    assert str(caught.value).startswith(message)


def test_a_recipe_is_not_hidden_by_what_lies_around(recipes: Catalog) -> None:
    Path("basic").mkdir()
    assert make_plan("basic", [], recipes).name == "basic"
    Path("seven").write_text(RUN)
    with pytest.raises(UserError, match=r"To run the file of that name, say \./seven"):
        make_plan("seven", [], recipes)
    assert make_plan("./seven", [], recipes).name == "seven"


def test_an_unknown_recipe_of_a_run_file_is_refused_with_its_line(recipes: Catalog) -> None:
    assert refusal('seed = 1\nrecipe = "basik"\n', plugins=recipes).startswith("run.toml:2: unknown recipe 'basik'.")
    assert refusal("recipe = 5\n", plugins=recipes) == "run.toml:1: recipe must be the name of a recipe, a string"


def test_a_requirement_for_another_python_does_not_count(recipes: Catalog) -> None:
    assert make_plan("elsewhere", [], recipes).name == "elsewhere"


# ---- Run folders --------------------------------------------------------------------------------------------------


def test_a_default_name_avoids_existing_folders_and_a_given_one_does_not() -> None:
    assert plan_of(RUN).folder == Path.cwd() / "runs" / "run"
    Path("runs/run").mkdir(parents=True)
    Path("runs/run-2").mkdir()
    assert plan_of(RUN).name == "run-3"
    named = plan_of(RUN, "name=run")
    assert named.folder == Path.cwd() / "runs" / "run"
    with pytest.raises(
        UserError, match=r"run folder .*/runs/run exists already; choose another name .* miles resume .*"
    ):
        claim(named)


def test_of_runs_that_begin_at_once_each_has_a_folder_of_its_own() -> None:
    first, second = plan_of(RUN), plan_of(RUN)
    assert claim(first)
    write_run_files(first, first.folder)
    assert not claim(second)
    assert load_plan(first.folder, catalog()) == first
    again = plan_of(RUN)
    assert claim(again)
    assert again.folder == Path.cwd() / "runs/run-2"
    one, other = (plan_of(RUN, "name=mine") for _ in range(2))
    assert claim(one)
    with pytest.raises(UserError, match=r"runs/mine exists already"):
        claim(other)


def test_a_link_to_nowhere_is_no_name_that_somebody_else_was_quicker_with() -> None:
    Path("runs").mkdir()
    Path("runs/run").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"runs/run exists already"):
        claim(plan_of(RUN))


def test_a_plan_says_how_to_continue_when_given_a_run_folder() -> None:
    write_run_files(plan_of(RUN), Path("runs/run"))
    with pytest.raises(UserError, match=r"to continue that run, say miles resume runs/run"):
        make_plan("runs/run", [], catalog())


names = st.text(min_size=1, max_size=5)
scalars = st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | names
flags = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**40),
        "loss.clip_high": st.floats(0, 1e6),
        "loss.aggregation": st.sampled_from(["token", "sequence", "group"]),
        "sampling.stop": st.lists(st.text(), max_size=3),
        "sampling.top_p": st.floats(1e-3, 1.0),
        "trainer.optimizer.betas": st.lists(st.floats(allow_nan=False), max_size=2),
        "trainer.dtype": st.sampled_from(["float32", "bfloat16"]),
        "data.path": st.text(),
        "data.limit": st.integers(),
        "data.extra": st.dictionaries(names, scalars | st.dictionaries(names, scalars, max_size=2), max_size=3),
        "filters": st.lists(
            st.fixed_dictionaries({"name": st.just("spread"), "threshold": st.floats(0, 1)}), max_size=2
        ),
        "reward": st.lists(
            st.fixed_dictionaries({"name": st.just("judge"), "weight": st.floats(-9, 9)}), min_size=1, max_size=2
        ),
        "cluster.address": st.text(),
        "engine.count": st.integers(1, 9),
        "critic.optimizer.learning_rate": st.floats(0, 1),
        "critic.loss.threshold": st.floats(0, 1),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(flags, st.sampled_from([RUN, STAGED]))
def test_a_run_folder_gives_back_an_equal_plan(said: dict[str, Any], text: str) -> None:
    if any(key.startswith("critic.") for key in said):
        text = text.replace("[advantage]", CRITIC + "[advantage]").replace('"whitened"', '"critic"')
    flags = [
        f"{key}={tomli_w.dumps({'x': value}).partition('x = ')[2]}"
        for key, value in said.items()
        if not isinstance(value, dict)
    ]
    if "data.extra" in said:
        text = text.replace(
            'path = "train.jsonl"',
            'path = "train.jsonl"\n' + tomli_w.dumps({"extra": said["data.extra"]}).replace("[extra", "[data.extra"),
        )
    plan = plan_of(text, *flags)
    write_run_files(plan, plan.folder)
    assert load_plan(plan.folder, catalog()) == plan
    shutil.rmtree(plan.folder)


def test_the_manifest_names_plugins_versions_and_origins() -> None:
    write_run_files(plan_of(RUN), Path("there"))
    manifest = json.loads(Path("there/manifest.json").read_text())
    assert manifest["plugins"][0] == ["fake-algorithms", "1.0", "fake_algorithms"]
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"miles-core", "ray", "transformers"} <= set(manifest["versions"])
    assert manifest["plugin_api"] == 1
    assert manifest["origins"]["loss.clip_high"] == "run.toml:23"


def test_a_moved_run_goes_on_where_it_is() -> None:
    plan = plan_of(RUN)
    write_run_files(plan, Path("moved/here"))
    assert load_plan(Path("moved/here"), catalog()) == dataclasses.replace(plan, folder=Path.cwd() / "moved/here")


def test_a_run_is_not_resumed_with_other_plugins() -> None:
    plan = plan_of(RUN)
    write_run_files(plan, plan.folder)
    message = r"was started with fake-algorithms 1\.0, but 2\.0 is installed; pip install fake-algorithms==1\.0"
    with pytest.raises(UserError, match=message):
        load_plan(plan.folder, catalog(algorithms="2.0"))
    missing = Catalog(tuple(plugin for plugin in catalog().plugins if plugin.name != "fake-algorithms"))
    with pytest.raises(UserError, match=r"was started with fake-algorithms 1\.0, but it is not active here"):
        load_plan(plan.folder, missing)


def test_what_is_no_run_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"nowhere holds no run: there is no manifest\.json in it"):
        load_plan(Path("nowhere"), catalog())
    Path("bad").mkdir()
    Path("bad/manifest.json").write_text("{\n,")
    with pytest.raises(UserError, match=r"manifest\.json:2: this is not valid JSON"):
        load_plan(Path("bad"), catalog())
    for text in ("{}", "[]"):
        Path("bad/manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"bad/manifest\.json is not what a run has written: begin it anew, from"):
            load_plan(Path("bad"), catalog())


# ---- Memory -------------------------------------------------------------------------------------------------------


def test_memory_is_what_the_parameters_weigh() -> None:
    flags = ["model.config.vocab_size=1000", "model.config.hidden_size=128", "trainer.ranks=2", "engine.count=2"]
    guess = estimate(plan_of(RUN, *flags), catalog())
    processes = {one.name: one for one in guess.processes}
    assert guess.parameters == 128_000
    assert list(processes) == ["driver", "collector", "engine", "trainer rank"]
    assert (processes["engine"].count, processes["trainer rank"].count) == (2, 2)
    assert processes["trainer rank"].memory == {"weights": 256_000, "gradients": 256_000, "AdamW moments": 512_000}
    # 8 samples a step on two engines; 2 layers of 4 heads of 32, keys and values, float32.
    assert processes["engine"].memory == {
        "weights": 512_000,
        "keys and values of 4 x 64 tokens": 4 * 64 * 2 * (2 * 4 * 32) * 4,
    }


def test_of_two_weight_syncs_for_a_pair_the_run_file_says_which() -> None:
    sync = WeightSyncSpec(**_said("other"), trainer="plain", engine="quick", receiver="nowhere:receiver")
    plugins = catalog(_plugin("fake-sync", sync))
    own = plan_of(RUN, plugins=plugins).sync
    assert own is not None
    assert own.plugin == "fake-stack"  # the engine's and the trainer's; what is installed beside it changes nothing
    for name, plugin in (("other", "fake-sync"), ("plain-to-quick", "fake-stack")):
        found = plan_of(RUN, f"publish.sync={name}", plugins=plugins)
        assert found.sync is not None
        assert (found.sync.spec.name, found.sync.plugin) == (name, plugin)
    with pytest.raises(UserError, match="weight sync 'choosy-to-quick' does not go from trainer 'plain'"):
        plan_of(RUN, "publish.sync=choosy-to-quick", plugins=plugins)
    with pytest.raises(UserError, match=r"publish\.sync: unknown weight sync 'othr'. Did you mean 'other'"):
        plan_of(RUN, "publish.sync=othr", plugins=plugins)


def test_of_two_weight_syncs_from_elsewhere_none_is_guessed() -> None:
    sync = WeightSyncSpec(**_said("other"), trainer="referee", engine="quick", receiver="nowhere:receiver")
    elsewhere = [_plugin("fake-one", sync), _plugin("fake-two", sync)]
    plugins = catalog(_plugin("fake-referee", TrainerSpec(**_said("referee"))), *elsewhere)
    with pytest.raises(UserError) as caught:
        plan_of(RUN, "trainer.name=referee", plugins=plugins)
    assert str(caught.value).endswith(
        "2 weight syncs go from trainer 'referee' to engine 'quick'. "
        'Say publish.sync = "fake-one:other" or "fake-two:other".'
    )


def test_a_reference_a_dtype_and_gpus_count() -> None:
    gives = TrainerSpec(**_said("referee"), gives=frozenset({"old_logprobs", "ref_logprobs"}))
    sync = WeightSyncSpec(**_said("referee-to-quick"), trainer="referee", engine="quick", receiver="nowhere:receiver")
    plugins = catalog(_plugin("fake-referee", gives, sync))
    flags = ["trainer.name=referee", "trainer.gpus=4", "engine.gpus=2", "model.dtype=bfloat16", "loss.kl_coef=0.1"]
    guess = estimate(plan_of(RUN, *flags, "model.config.vocab_size=1000", plugins=plugins), plugins)
    engine, trainer = guess.processes[2:]
    assert (trainer.count, trainer.gpus) == (4, 1)
    assert trainer.memory["reference weights"] == 1000 * 64 * 4 // 4
    assert engine.memory["weights"] == 1000 * 64 * 2 // 2


def test_a_critic_counts_where_it_is() -> None:
    flags = ["model.config.vocab_size=1000", "model.config.hidden_size=128", "trainer.ranks=4"]
    *_, trainer = estimate(plan_of(ACTING, *flags), catalog()).processes
    assert {name: size for name, size in trainer.memory.items() if name.startswith("critic")} == {
        "critic's weights": 128_000,
        "critic's gradients": 128_000,
        "critic's AdamW moments": 256_000,
    }
    *_, trainer, critic = estimate(plan_of(ACTING, *flags, "critic.ranks=2"), catalog()).processes
    assert set(trainer.memory) == {"weights", "gradients", "AdamW moments"}
    assert (critic.name, critic.count) == ("critic rank", 2)
    assert critic.memory == {"weights": 256_000, "gradients": 256_000, "AdamW moments": 512_000}


@pytest.mark.parametrize(
    ("architectures", "path", "reason"),
    [
        (["OddForCausalLM"], "./model", "no installed model plugin covers OddForCausalLM"),
        (["TinyForCausalLM"], "./model", "model family 'tiny' cannot count this config.json: KeyError: 'vocab_size'"),
        ([], "nobody/has-this-model", "nobody/has-this-model is not on this machine yet"),
    ],
)
def test_memory_that_cannot_be_known_is_said_to_be_unknown(architectures: list[str], path: str, reason: str) -> None:
    model_folder("tokenizer.json", architectures=architectures)
    guess = estimate(plan_of(RUN, f"model.path={path}"), catalog())
    assert (guess.parameters, guess.unknown) == (None, reason)
    assert all(not processes.memory for processes in guess.processes)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB"), (2**50, "1.02e+03 TiB")]
)
def test_bytes_are_readable(size: int, text: str) -> None:
    assert readable(size) == text


# ---- Commands -----------------------------------------------------------------------------------------------------


def plan_command(monkeypatch: pytest.MonkeyPatch, *args: str) -> Result:
    monkeypatch.setattr("miles_core.config.layers.discover", lambda *, disable=(): catalog())
    Path("run.toml").write_text(STAGED)
    return CliRunner().invoke(plan_command_of_miles, ["run.toml", *args], catch_exceptions=False)


def test_the_plan_is_printed_with_origins_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    output = plan_command(monkeypatch, "stages.rl.loss.clip_high=0.5").output
    lines = [line.split() for line in output.splitlines()]
    assert ["stages.rl.loss.clip_high", "0.5", "flag", "stages.rl.loss.clip_high=0.5"] in lines
    assert ["seed", "0", "default"] in lines
    assert ["cluster.address", "unset", "default"] in lines
    assert ["driver", "1", "1", "CPU", "no", "model"] in lines
    assert output.splitlines()[0] == f"Run staged: 15 steps, in {Path.cwd() / 'runs' / 'staged'}"


def test_a_terminal_shows_the_plan_as_a_tree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan = plan_of(STAGED)
    draw_plan(plan, estimate(plan, catalog()))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    start = lines.index("stages")
    assert [lines[start + 1], lines[start + 3]] == ["  warm-up", "    schedule"]
    assert lines[start + 4].split() == ["steps", "10", "run.toml:26"]
    assert lines.count("  rl") == 1


def test_the_plan_as_json_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = json.loads(plan_command(monkeypatch, "--json").output)
    assert shown["steps"] == 15
    assert shown["values"]["stages"][1]["loss"]["clip_high"] == 0.28
    assert shown["origins"]["stages.rl.loss.clip_high"] == "run.toml:21"
    assert shown["parameters"] == 258 * 64
    assert [processes["name"] for processes in shown["processes"]] == ["driver", "collector", "engine", "trainer rank"]


def test_a_loss_whose_result_depends_on_packing_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    comparing = _plugin("fake-comparing", LossSpec(**_said("comparing"), compares_samples=True))
    monkeypatch.setattr("miles_core.config.layers.discover", lambda *, disable=(): catalog(comparing))
    Path("run.toml").write_text(RUN)
    note = "Note: loss 'comparing' compares the samples of a micro-batch, so results depend on how they are packed"
    for flags, notes in (((), []), (("loss.name=comparing",), [note])):
        shown = CliRunner().invoke(plan_command_of_miles, ["run.toml", *flags], catch_exceptions=False).output
        assert [line for line in shown.splitlines() if line.startswith("Note:")] == notes


def test_a_run_file_may_begin_with_the_mark_that_windows_writes() -> None:
    Path("marked.toml").write_text(RUN, encoding="utf-8-sig")
    assert read_run_file(Path("marked.toml")).plain()["data"]["path"] == "train.jsonl"


def test_recipes_are_listed_and_shown(recipes: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_core.plugins.discover", lambda: recipes)
    runner = CliRunner()
    assert ["basic", "fake-recipes", "A", "recipe."] in [
        line.split() for line in runner.invoke(recipes_command, ["list"]).output.splitlines()
    ]
    assert runner.invoke(recipes_command, ["show", "basic"]).output == RUN
    with pytest.raises(UserError, match="unknown recipe 'basik'"):
        runner.invoke(recipes_command, ["show", "basik"], catch_exceptions=False)


def test_plugins_are_disabled_before_they_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr("miles_core.config.layers.discover", lambda *, disable=(): seen.append(tuple(disable)))
    Path("run.toml").write_text('[plugins]\ndisable = ["a"]\n')
    open_catalog("run.toml", ['plugins.disable=["b"]'], disable=("c",))
    assert seen == [("c", "a", "b")]


def test_a_colocated_run_has_a_rank_of_the_trainer_for_each_place_in_an_engine() -> None:
    sync = WeightSyncSpec(
        **_said("beside"),
        trainer="plain",
        engine="quick",
        receiver="nowhere:receiver",
        layouts=frozenset({"colocated"}),
    )
    plugins = catalog(_plugin("fake-sync", sync))
    colocated = ("placement.layout=colocated", "engine.count=2", "engine.gpus=2")
    found = plan_of(RUN, *colocated, "trainer.gpus=4", plugins=plugins)
    assert found.sync is not None
    assert (found.sync.spec.name, found.placement.takes_turns) == ("beside", True)
    without = plan_of(RUN, plugins=plugins)
    assert without.sync is not None
    assert (without.sync.spec.name, without.placement.takes_turns) == ("plain-to-quick", False)
    for flags, error in (
        (
            (*colocated, "trainer.gpus=2"),
            "the trainer has 2 ranks and the engines have 2 x 2 GPUs; set trainer.gpus",
        ),
        (
            (*colocated, "engine.gpus=0"),
            "the trainer has 1 ranks and there are 2 engines; set engine.count",
        ),
        (colocated, "trainer.gpus is 0 and engine.gpus is 2; give both GPUs, or neither"),
        (
            (*colocated[:1], "schedule.max_staleness=1"),
            "schedule.max_staleness is 1, but colocated engines sleep",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(error)):
            plan_of(RUN, *flags, plugins=plugins)
    ahead = plan_of(RUN, *colocated[:1], "schedule.max_staleness=1", "placement.sleep=false", plugins=plugins)
    assert not ahead.placement.takes_turns
    with pytest.raises(UserError, match="no weight sync goes from trainer 'plain' to engine 'quick' where they"):
        plan_of(RUN, *colocated[:1])
