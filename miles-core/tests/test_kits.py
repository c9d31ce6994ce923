"""The rules about components: each finds the mistake that it is there for, and is content with a right component."""

from __future__ import annotations

import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from miles_core.errors import MissingExtraError, UserError
from miles_core.plugins import Plugin, discover
from miles_core.roles import AdvantageInputs, CorrectionInputs, CorrectionOutputs, LossInputs, LossOutputs
from miles_core.run.rollouts import SingleTurn
from miles_core.sample import Group, Prompt, Sample
from miles_core.specs import (
    AdvantageSpec,
    CallbackSpec,
    CorrectionSpec,
    DataSourceSpec,
    FilterSpec,
    LossSpec,
    RewardSpec,
    RolloutSpec,
    Spec,
    TrackerSpec,
)
from miles_core.testing import Example, checks, contract_tests
from miles_core.testing.checks import Verdict, cases

NAMES = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the components below."""

    kl_coef: float = 0.0


def verdicts(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[..., Spec], part: Any, example: Example | None = None, **traits: Any
) -> list[Verdict]:
    """Of every rule about a record of `kind` whose implementation is `part`."""
    module = ModuleType(f"acme_part_{next(NAMES)}")
    module.part = part  # type: ignore[attr-defined]
    module.Options = Options  # type: ignore[attr-defined]
    module.example = lambda folder: example  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    named = {"example": f"{module.__name__}:example"} if example else {}
    record = kind(
        **{
            "name": "part",
            "ref": f"{module.__name__}:part",
            "options": f"{module.__name__}:Options",
            "summary": "s",
            **named,
            **traits,
        }
    )
    plugin = Plugin(name="acme", version="1", entry="acme", requires=">=0.1", status="active", records=(record,))
    return [case.run() for case in cases(plugin) if case.record]


def broken(*args: Any, **kwargs: Any) -> dict[str, tuple[str, ...]]:
    return {verdict.rule: verdict.faults for verdict in verdicts(*args, **kwargs) if verdict.faults}


# ---- Losses ---------------------------------------------------------------------------------------------------------


def good_loss(inputs: LossInputs, options: Options) -> LossOutputs:
    assert inputs.advantages is not None
    gains = inputs.segments.spread(inputs.segments.mean(inputs.advantages))
    penalties = None
    if options.kl_coef:
        assert inputs.ref_logprobs is not None
        penalties = options.kl_coef * (inputs.logprobs - inputs.ref_logprobs)
    return LossOutputs(losses=-inputs.logprobs * gains, penalties=penalties, metrics={"gain": gains})


GOOD_LOSS: Mapping[str, Any] = {"needs": frozenset({"advantages"}), "needs_if": {"ref_logprobs": "kl_coef"}}


def averaging(inputs: LossInputs, options: Options) -> LossOutputs:
    return LossOutputs(losses=good_loss(inputs, options).losses.mean())


def unbounded(inputs: LossInputs, options: Options) -> LossOutputs:
    good = good_loss(inputs, options)
    return replace(good, losses=good.losses * (5 * inputs.logprobs.detach().abs()).exp().square().square())


def comparing(inputs: LossInputs, options: Options) -> LossOutputs:
    good = good_loss(inputs, options)
    return replace(good, losses=good.losses - inputs.logprobs.mean())


def counting_locally(inputs: LossInputs, options: Options) -> LossOutputs:
    """Right on one rank, wrong where a sample lies on two: it does not sum through `segments`."""
    good = good_loss(inputs, options)
    lengths = inputs.segments.ids.bincount(minlength=inputs.segments.count)
    return replace(good, losses=good.losses / lengths[inputs.segments.ids])


def peeking(inputs: LossInputs, options: Options) -> LossOutputs:
    good = good_loss(inputs, options)
    return good if inputs.staleness is None else replace(good, losses=good.losses + inputs.staleness)


def deaf(inputs: LossInputs, options: Options) -> LossOutputs:
    return LossOutputs(losses=-inputs.logprobs)


def forgetful(inputs: LossInputs, options: Options) -> LossOutputs:
    return replace(good_loss(inputs, options), penalties=None)


def gradient_in_metric(inputs: LossInputs, options: Options) -> LossOutputs:
    return replace(good_loss(inputs, options), metrics={"loss": inputs.logprobs})


def in_place(inputs: LossInputs, options: Options) -> LossOutputs:
    assert inputs.advantages is not None
    good = good_loss(inputs, options)
    inputs.advantages.mul_(2)
    return good


def dice(inputs: LossInputs, options: Options) -> LossOutputs:
    good = good_loss(inputs, options)
    return replace(good, losses=good.losses + random.random())


def of_another_type(inputs: LossInputs, options: Options) -> Any:
    return -inputs.logprobs


def detached(inputs: LossInputs, options: Options) -> LossOutputs:
    return good_loss(replace(inputs, logprobs=inputs.logprobs.detach()), options)


def test_a_right_loss_keeps_every_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(monkeypatch, LossSpec, good_loss, **GOOD_LOSS)
    assert [verdict.rule for verdict in found if verdict.faults or verdict.skipped] == []
    assert len(found) == 6


@pytest.mark.parametrize(
    ("loss", "rules"),
    [
        (averaging, {"gives_a_finite_loss_for_each_token", "does_not_depend_on_packing"}),
        (unbounded, {"gives_a_finite_loss_for_each_token"}),
        (gradient_in_metric, {"gives_a_finite_loss_for_each_token"}),
        (comparing, {"gives_masked_tokens_no_gradient", "does_not_depend_on_packing"}),
        (counting_locally, {"does_not_depend_on_packing"}),
        (peeking, {"needs_exactly_what_it_reads"}),
        (deaf, {"needs_exactly_what_it_reads"}),
        (detached, {"has_a_gradient"}),
        (dice, {"does_not_depend_on_packing", "is_a_pure_function", "needs_exactly_what_it_reads"}),
    ],
)
def test_a_wrong_loss_breaks_the_rule_for_its_mistake(
    monkeypatch: pytest.MonkeyPatch, loss: Any, rules: set[str]
) -> None:
    found = broken(monkeypatch, LossSpec, loss, **GOOD_LOSS)
    assert rules <= set(found)
    if loss not in (averaging, dice):  # which are wrong in so many ways that others stumble too
        assert set(found) == rules


def test_a_loss_that_changes_its_inputs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "it changes advantages in place" in str(broken(monkeypatch, LossSpec, in_place, **GOOD_LOSS))


def test_a_loss_that_reads_a_column_only_with_an_option_must_do_so(monkeypatch: pytest.MonkeyPatch) -> None:
    traits = {"needs": frozenset({"advantages"}), "needs_if": {"ref_logprobs": "kl_coef"}}
    assert broken(monkeypatch, LossSpec, deaf, needs=frozenset({"advantages"}))["needs_exactly_what_it_reads"] == (
        "with everything optional off, it needs advantages and does not read it",
    )
    found = broken(monkeypatch, LossSpec, lambda inputs, options: good_loss(inputs, Options()), **traits)
    assert found == {"needs_exactly_what_it_reads": ("with kl_coef on, it needs ref_logprobs and does not read it",)}


def test_what_is_no_loss_output_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = broken(monkeypatch, LossSpec, of_another_type, **GOOD_LOSS)
    assert found["is_a_pure_function"] == ("TypeError: it gave a Tensor; it must give LossOutputs",)


def test_a_loss_that_says_it_compares_samples_may(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(monkeypatch, LossSpec, comparing, **GOOD_LOSS, compares_samples=True)
    assert [verdict.rule for verdict in found if verdict.faults] == []
    assert [verdict.rule for verdict in found if verdict.skipped] == [
        "gives_masked_tokens_no_gradient", "does_not_depend_on_packing",
    ]  # fmt: skip


# ---- Corrections ----------------------------------------------------------------------------------------------------


def ratio(inputs: CorrectionInputs, options: Options) -> CorrectionOutputs:
    return CorrectionOutputs(weights=(inputs.old_logprobs - inputs.rollout_logprobs).clamp(-5, 5).exp())


def scaled(change: Callable[[CorrectionInputs, Any], Any]) -> Callable[[CorrectionInputs, Options], CorrectionOutputs]:
    return lambda inputs, options: CorrectionOutputs(weights=change(inputs, ratio(inputs, options).weights))


@pytest.mark.parametrize(
    ("correction", "rules"),
    [
        (ratio, set()),
        (scaled(lambda inputs, weights: 2 * weights), {"leaves_tokens_of_the_same_policy_alone"}),
        (scaled(lambda inputs, weights: 2 * weights - 1), {"gives_a_weight_for_each_token"}),
        (scaled(lambda inputs, weights: weights / weights.mean()), {"does_not_depend_on_packing"}),
        (
            scaled(lambda inputs, weights: weights if inputs.advantages is None else weights.clamp(max=1)),
            {"needs_exactly_what_it_reads"},
        ),
    ],
)
def test_corrections(monkeypatch: pytest.MonkeyPatch, correction: Any, rules: set[str]) -> None:
    assert set(broken(monkeypatch, CorrectionSpec, correction)) == rules


def bounded_where_it_costs(inputs: CorrectionInputs, options: Options) -> CorrectionOutputs:
    """With `kl_coef` on, it reads the advantages."""
    weights = ratio(inputs, options).weights
    if options.kl_coef:
        assert inputs.advantages is not None
        weights = weights.where(inputs.advantages > 0, weights.clamp(max=1))
    return CorrectionOutputs(weights=weights)


SWITCHED: Mapping[str, Any] = {"needs_if": {"advantages": "kl_coef"}}


def test_a_correction_must_use_the_advantages_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = frozenset({"advantages", "old_logprobs", "rollout_logprobs"})
    found = broken(monkeypatch, CorrectionSpec, ratio, needs=needs)
    fault = "with everything optional off, it needs advantages, and they make no difference"
    assert found == {"needs_exactly_what_it_reads": (fault,)}
    found = broken(monkeypatch, CorrectionSpec, ratio, **SWITCHED)
    fault = "with kl_coef on, it needs advantages, and they make no difference"
    assert found == {"needs_exactly_what_it_reads": (fault,)}


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_correction_gets_advantages_where_an_option_makes_it_need_them(
    monkeypatch: pytest.MonkeyPatch, kl_coef: float
) -> None:
    example = Example(options={"kl_coef": kl_coef})
    assert broken(monkeypatch, CorrectionSpec, bounded_where_it_costs, example, **SWITCHED) == {}


# ---- Advantages -----------------------------------------------------------------------------------------------------


def per_token(values: Any, inputs: AdvantageInputs) -> dict[str, Any]:
    return {"advantages": np.where(inputs.mask, values[inputs.segment_ids], 0.0)}


def centred(inputs: AdvantageInputs) -> Any:
    means = np.array([inputs.rewards[inputs.groups == group].mean() for group in inputs.groups])
    return inputs.rewards - means


def divided(inputs: AdvantageInputs, options: Any) -> dict[str, Any]:
    deviations = np.array([inputs.rewards[inputs.groups == group].std(ddof=1) for group in inputs.groups])
    with np.errstate(all="ignore"):
        return per_token(centred(inputs) / deviations, inputs)


def divided_safely(inputs: AdvantageInputs, options: Any) -> dict[str, Any]:
    deviations = np.array([inputs.rewards[inputs.groups == group].std() for group in inputs.groups])
    return per_token(centred(inputs) / np.where(deviations > 0, deviations, 1.0), inputs)


@pytest.mark.filterwarnings("ignore:Degrees of freedom")
@pytest.mark.parametrize(
    ("advantage", "rules"),
    [
        (lambda inputs, options: per_token(centred(inputs), inputs), set()),
        (divided_safely, set()),
        (divided, {"gives_finite_columns", "survives_groups_of_one"}),
        (lambda inputs, options: per_token(inputs.rewards, inputs), {"compares_within_groups"}),
        (
            lambda inputs, options: per_token(centred(inputs) ** 3, inputs),
            {"keeps_the_scale_of_rewards"},
        ),
        (
            lambda inputs, options: per_token(np.sign(centred(inputs)) * np.abs(centred(inputs)) ** 0.5, inputs),
            {"keeps_the_scale_of_rewards"},
        ),
        (
            lambda inputs, options: per_token(centred(inputs) * np.linspace(1, 2, len(inputs.rewards)), inputs),
            {"ignores_the_order_of_samples"},
        ),
        (
            lambda inputs, options: per_token(centred(inputs) + inputs.columns["values"].sum(), inputs),
            {"needs_exactly_what_it_reads"},
        ),
    ],
)
def test_advantages(monkeypatch: pytest.MonkeyPatch, advantage: Any, rules: set[str]) -> None:
    found = broken(monkeypatch, AdvantageSpec, advantage, groups=True)
    if rules == {"needs_exactly_what_it_reads"}:  # every other rule stumbles over the missing column too
        assert found["needs_exactly_what_it_reads"] == (
            "with everything optional off, it reads the column 'values', which its record does not say it needs",
        )
    else:
        assert set(found) == rules


def test_an_advantage_must_read_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = broken(
        monkeypatch,
        AdvantageSpec,
        lambda inputs, options: per_token(centred(inputs), inputs),
        needs=frozenset({"values"}),
    )
    assert found == {"needs_exactly_what_it_reads": ("it needs values and does not read it",)}


def penalised(column: str) -> Callable[[AdvantageInputs, Options], dict[str, Any]]:
    """Reads a column if an option is on."""

    def advantage(inputs: AdvantageInputs, options: Options) -> dict[str, Any]:
        given = per_token(centred(inputs), inputs)
        if options.kl_coef:
            given["advantages"] = given["advantages"] + options.kl_coef * inputs.columns[column] * inputs.mask
        return given

    return advantage


@pytest.mark.parametrize(
    ("advantage", "fault"),
    [
        (penalised("ref_logprobs"), None),
        (lambda inputs, options: per_token(centred(inputs), inputs), "it needs ref_logprobs and does not read it"),
        (penalised("values"), "it reads the column 'values', which its record does not say it needs"),
    ],
)
def test_an_advantage_reads_with_an_option_what_it_says(
    monkeypatch: pytest.MonkeyPatch, advantage: Any, fault: str | None
) -> None:
    found = broken(monkeypatch, AdvantageSpec, advantage, needs_if={"ref_logprobs": "kl_coef"})
    assert found == ({} if fault is None else {"needs_exactly_what_it_reads": (f"with kl_coef on, {fault}",)})


# ---- Rewards and filters --------------------------------------------------------------------------------------------


def reward(score: Callable[[Sequence[Sample]], Any]) -> type:
    return type("Reward", (), {"__init__": lambda self, options: None, "score": lambda self, samples: score(samples)})


def length(sample: Sample) -> float:
    return float(len(sample.response))


@pytest.mark.parametrize(
    ("score", "rules"),
    [
        (lambda samples: [length(sample) for sample in samples], set()),
        (lambda samples: [1.0], {"gives_one_finite_score_for_each_sample", "scores_an_empty_response"}),
        (lambda samples: [1 / length(sample) for sample in samples], {"scores_an_empty_response"}),
        (lambda samples: [random.random() for _ in samples], {"gives_the_same_score_again"}),
        (lambda samples: [float(index) for index, _ in enumerate(samples)], {"gives_the_same_score_again"}),
        (lambda samples: [float(sample.mask.fill(False) is None) for sample in samples], {"changes_no_sample"}),
    ],
)
def test_rewards(monkeypatch: pytest.MonkeyPatch, score: Any, rules: set[str]) -> None:
    found = broken(monkeypatch, RewardSpec, reward(score))
    assert rules <= set(found)
    assert len(rules) != 1 or set(found) == rules


def test_a_reward_that_says_so_may_be_random_or_compare_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken(monkeypatch, RewardSpec, reward(lambda s: [random.random() for _ in s]), deterministic=False) == {}
    longest = reward(lambda samples: [float(length(one) == max(map(length, samples))) for one in samples])
    assert broken(monkeypatch, RewardSpec, longest, scope="group") == {}
    assert set(broken(monkeypatch, RewardSpec, longest)) == {"gives_the_same_score_again"}


def filter_of(keep: Callable[[Group], Any]) -> type:
    return type("Filter", (), {"__init__": lambda self, options: None, "keep": lambda self, group: keep(group)})


def test_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken(monkeypatch, FilterSpec, filter_of(lambda group: len(group) > 2)) == {}
    assert set(broken(monkeypatch, FilterSpec, filter_of(len))) == {"answers_true_or_false"}
    turns = itertools.cycle([True, True, True, False])
    assert "keeps_what_it_kept" in broken(monkeypatch, FilterSpec, filter_of(lambda group: next(turns)))
    popping = filter_of(lambda group: bool(group and group.pop()))
    assert "it changes different rewards" in str(broken(monkeypatch, FilterSpec, popping))


# ---- Rollouts and data sources --------------------------------------------------------------------------------------


class Rollout(SingleTurn):
    """Core's, with a mistake."""

    def __init__(self, options: Any) -> None: ...

    def change(self, samples: Group) -> Group:
        return samples

    async def run(self, prompt: Prompt, seeds: Sequence[int], context: Any) -> Group:
        return self.change(await super().run(prompt, seeds, context))


def rollout(change: Callable[[Sample], Sample]) -> type:
    return type("Changed", (Rollout,), {"change": lambda self, samples: [change(sample) for sample in samples]})


@pytest.mark.parametrize(
    ("part", "rules"),
    [
        (Rollout, set()),
        (rollout(lambda sample: replace(sample, reward=0.0)), {"gives_one_unscored_sample_for_each_seed"}),
        (rollout(lambda sample: replace(sample, group=0)), {"gives_one_unscored_sample_for_each_seed"}),
        (
            rollout(lambda sample: replace(sample, logprobs=np.roll(sample.logprobs, 1))),
            {"aligns_tokens_masks_and_logprobs"},
        ),
        (
            rollout(lambda sample: replace(sample, response=sample.response + 1)),
            {"aligns_tokens_masks_and_logprobs"},
        ),
        (
            rollout(lambda sample: replace(sample, versions=np.full_like(sample.versions, -1))),
            {"aligns_tokens_masks_and_logprobs"},
        ),
        (rollout(lambda sample: replace(sample, prompt=sample.prompt[1:])), {"aligns_tokens_masks_and_logprobs"}),
        (rollout(lambda sample: replace(sample, status="completed")), {"says_what_became_of_it"}),
        (rollout(lambda sample: replace(sample, baseline=True)), {"marks_baselines"}),
    ],
)
def test_rollouts(monkeypatch: pytest.MonkeyPatch, part: type, rules: set[str]) -> None:
    assert set(broken(monkeypatch, RolloutSpec, part)) == rules


class Again(Rollout):
    """Asks once more for whatever came back."""

    async def run(self, prompt: Prompt, seeds: Sequence[int], context: Any) -> Group:
        await super().run(prompt, seeds, context)
        return await super().run(prompt, seeds, context)


class Restless(Rollout):
    """Never does the same twice."""

    async def run(self, prompt: Prompt, seeds: Sequence[int], context: Any) -> Group:
        return await super().run(prompt, [seed + next(NAMES) for seed in seeds], context)


def test_a_rollout_must_be_a_function_of_its_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(broken(monkeypatch, RolloutSpec, Restless)) == {"gives_the_same_again"}


def test_a_rollout_that_goes_on_after_an_abort_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "it asks for 6 completions for 3 samples" in str(broken(monkeypatch, RolloutSpec, Again))


class Source:
    """Five prompts, round and round; evaluation has others."""

    first_id = 0
    seeks = True
    splits = True
    size: int | None = 5

    def __init__(self, options: Any, context: Any) -> None:
        self.split = context.split if self.splits else "train"
        self.limit = context.max_prompt_tokens
        self.position = 0

    def next(self) -> Prompt:
        position, place = self.position, self.position % 5
        self.position += 1
        text = f"{self.split} {'x' * place}"[: self.limit]
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return Prompt(id=position + self.first_id, tokens=tokens, text=text, answer="a")

    def seek(self, position: int) -> None:
        if self.seeks:
            self.position = position


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({}, set()),
        ({"first_id": 1}, {"numbers_its_prompts"}),
        ({"seeks": False}, {"goes_on_where_it_stopped"}),
        ({"size": 4}, {"repeats_after_an_epoch"}),
        ({"splits": False}, {"keeps_evaluation_apart"}),
    ],
)
def test_data_sources(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], rules: set[str]) -> None:
    part = type("Changed", (Source,), changes)
    assert set(broken(monkeypatch, DataSourceSpec, part, answers=True)) == rules


def test_a_data_source_that_ignores_the_limit_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Source):
        def __init__(self, options: Any, context: Any) -> None:
            super().__init__(options, context)
            self.limit = 100

    (fault,) = broken(monkeypatch, DataSourceSpec, Endless)["keeps_to_the_limit"]
    assert "tokens, and 8 are allowed" in fault


def test_a_data_source_must_be_a_function_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shuffled(Source):
        def __init__(self, options: Any, context: Any) -> None:
            super().__init__(options, context)
            self.position = next(NAMES) % 5

    assert "is_a_function_of_the_seed" in broken(monkeypatch, DataSourceSpec, Shuffled)


# ---- Trackers and callbacks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("Tracker", set()),
        ("Averaging", {"survives_a_run_without_metrics"}),
        ("Reading", {"survives_a_run_without_metrics"}),
        ("Locking", {"survives_a_run_that_fails"}),
        ("Fragile", {"survives_a_run_that_fails"}),
        ("Strict", {"follows_a_run"}),
        ("Endless", {"follows_a_run", "survives_a_run_without_metrics", "survives_a_run_that_fails"}),
    ],
)
def test_trackers(monkeypatch: pytest.MonkeyPatch, name: str, rules: set[str]) -> None:
    assert set(broken(monkeypatch, TrackerSpec, None, ref=f"trackers_kit:{name}", options=None)) == rules


def callback(**hooks: Any) -> type:
    return type("Callback", (), {"__init__": lambda self, options: None, **hooks})


def test_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = {"runs_on": frozenset({"driver"})}
    good = callback(step_end=lambda self, metrics: None)
    assert broken(monkeypatch, CallbackSpec, good, **driver) == {}
    greedy = callback(step_end=lambda self, metrics: metrics["reward"])
    assert set(broken(monkeypatch, CallbackSpec, greedy, **driver)) == {"hears_a_run_in_the_driver"}
    started = callback(run_start=lambda self, run: setattr(self, "clock", 1), run_failed=lambda self, error: self.clock)
    assert set(broken(monkeypatch, CallbackSpec, started, **driver)) == {"survives_a_run_that_fails"}
    trainer = {"runs_on": frozenset({"trainer"})}
    infinite = callback(after_train_step=lambda self, metrics: metrics.update(share=math.inf))
    assert broken(monkeypatch, CallbackSpec, infinite, **trainer) == {
        "hears_a_run_in_a_trainer": ("the metric share is inf", "the metric share is inf")
    }


def test_a_callback_beside_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = {"runs_on": frozenset({"rollout"})}
    good = callback(weights_received=lambda self, version: None)
    assert broken(monkeypatch, CallbackSpec, good, **rollout) == {}
    proud = callback(weights_received=lambda self, version: [][version])
    assert set(broken(monkeypatch, CallbackSpec, proud, **rollout)) == {"hears_a_run_beside_an_engine"}


# ---- Recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[schedule]\nsteps = 1\n", "model needs either `path` or `family`"),
        ("[schedule\n", "recipe wrong, line 1: this is not valid TOML"),
        ("[schdule]\nsteps = 1\n", "Did you mean 'schedule'"),
    ],
)
def test_recipes(site: Any, text: str, fault: str) -> None:
    hook = (
        "@hookimpl\ndef miles_recipes():\n    yield RecipeSpec(name='wrong', ref='acme_parts:recipe.toml', summary='s')"
    )
    site.install("acme-recipe", hook)
    (site.folder / "acme_parts").mkdir()
    (site.folder / "acme_parts/__init__.py").touch()
    (site.folder / "acme_parts/recipe.toml").write_text(text)
    found = [case.run() for case in cases(discover().plugin("acme-recipe")) if case.record]
    ((rule, faults),) = [(verdict.rule, verdict.faults) for verdict in found]
    assert rule == "can_be_planned"
    assert fault in str(faults)


def test_a_recipe_whose_component_lacks_an_extra_is_not_tried(site: Any) -> None:
    hooks = (
        "@hookimpl\ndef miles_recipes():\n    yield RecipeSpec(name='r', ref='acme_parts:recipe.toml', summary='s')\n"
        "@hookimpl\ndef miles_engines():\n"
        "    yield EngineSpec(name='e', ref='acme_parts.e:E', options='acme_parts.e:Options', summary='s')"
    )
    site.install("acme-lacking", hooks)
    (site.folder / "acme_parts").mkdir()
    (site.folder / "acme_parts/__init__.py").touch()
    (site.folder / "acme_parts/recipe.toml").write_text('model = { path = "acme/m" }\nengine = "e"\n')
    (site.folder / "acme_parts/e.py").write_text(
        "from dataclasses import dataclass\nfrom miles_core.extras import import_extra\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Options:\n    def __post_init__(self):\n"
        "        import_extra('acme_gpu', needed_by='engine e', install='acme-lacking[gpu]')\n"
    )
    found = [case.run() for case in cases(discover().plugin("acme-lacking")) if case.record == "recipe r"]
    ((faults, skipped),) = [(verdict.faults, verdict.skipped) for verdict in found]
    assert not faults
    assert "pip install 'acme-lacking[gpu]'" in skipped


# ---- Examples, skips, limits ----------------------------------------------------------------------------------------


def test_an_example_says_how_to_try_what_must_be_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Chosen(reward(lambda samples: [0.0 for _ in samples])):  # type: ignore[misc]
        def __init__(self, options: Options) -> None:
            seen.append(options.kl_coef)

    assert broken(monkeypatch, RewardSpec, Chosen, Example(options={"kl_coef": 0.25})) == {}
    assert set(seen) == {0.25}


def test_an_example_may_say_that_it_cannot_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(monkeypatch, RewardSpec, reward(lambda samples: []), Example(skip="needs a server"))
    assert {verdict.skipped for verdict in found} == {"needs a server"}


def test_an_extra_that_is_not_installed_is_a_reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(options: Any, run: Any) -> Any:
        raise MissingExtraError("tracker acme needs acme-sdk: pip install acme[sdk]")

    found = verdicts(monkeypatch, TrackerSpec, missing)
    assert {verdict.skipped for verdict in found} == {"tracker acme needs acme-sdk: pip install acme[sdk]"}


def test_a_rule_whose_library_is_not_there_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = verdicts(monkeypatch, LossSpec, good_loss, **GOOD_LOSS)
    assert {verdict.skipped for verdict in found} == {"torch is not installed"}


@pytest.mark.parametrize("error", [SystemExit(3), ValueError("no")])
def test_whatever_a_component_raises_is_a_fault(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raises(samples: Sequence[Sample]) -> Any:
        raise error

    found = broken(monkeypatch, RewardSpec, reward(raises))
    assert set(found) == {
        "gives_one_finite_score_for_each_sample",
        "scores_an_empty_response",
        "gives_the_same_score_again",
        "changes_no_sample",
    }
    assert found["changes_no_sample"][0].startswith(type(error).__name__)


def test_a_component_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LIMIT_S", 0.2)
    found = broken(monkeypatch, FilterSpec, filter_of(lambda group: time.sleep(60)))
    assert found["answers_true_or_false"] == ("answers true or false takes more than 0.2 s",)


def test_contract_tests_make_one_test_a_rule() -> None:
    test = contract_tests("miles-core")
    (mark,) = test.pytestmark  # type: ignore[attr-defined]
    found = mark.args[1]
    assert found[0].rule == "loads"
    assert ("filter nonzero-std", "answers_true_or_false") in [(case.record, case.rule) for case in found]
    test(found[0])  # passes


def test_contract_tests_fail_with_the_faults_and_skip_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    test = contract_tests("miles-core")
    verdict = Verdict(rule="loads", faults=("one thing", "another"))
    case = checks.Case(rule="loads", record="", faults=lambda: verdict.faults)
    with pytest.raises(pytest.fail.Exception, match="one thing\nanother"):
        test(case)
    needs_server = verdicts(monkeypatch, RewardSpec, reward(lambda samples: []), Example(skip="needs a server"))[0]
    assert needs_server.skipped
    with pytest.raises(UserError, match="no plugin 'miles-cora' is installed"):
        contract_tests("miles-cora")
