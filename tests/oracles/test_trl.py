"""Against TRL 1.16: the losses of its GRPO trainer, its advantages, and its weights for vLLM's samples, to 1e-8."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miles_core.run.objective import Objective
from miles_grpo.advantage.gdpo import gdpo
from miles_grpo.advantage.grpo import dr_grpo, grpo
from miles_grpo.correction.opsm import opsm
from miles_grpo.correction.tis import tis
from miles_grpo.loss.cispo import cispo
from miles_grpo.loss.clipped import clipped
from miles_grpo.loss.gspo import gspo
from miles_grpo.loss.sapo import sapo
from miles_grpo.options import CISPO, GDPO, GSPO, OPSM, SAPO, TIS, ClippedLoss, GRPOAdvantage, InReward

OUR_CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}


def loss_of(trl, case, *, inputs=None, args=None, **settings):
    """What its `_compute_loss` gives for log-probabilities that are already there."""
    defaults = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": 7,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
    }
    trainer = trl.grpo.__new__(trl.grpo)
    for name, value in {**defaults, **settings}.items():
        setattr(trainer, name, value)
    theirs = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1, **(args or {})}
    trainer.args = SimpleNamespace(sapo_temperature_pos=1.0, sapo_temperature_neg=1.5, **theirs)
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": defaultdict(list)}
    trainer.accelerator = SimpleNamespace(
        num_processes=1, gather=lambda one: one, reduce=lambda one, reduction: one, sync_gradients=True
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (case.logprobs, case.entropy, None)
    ids = torch.zeros(case.mask.shape, dtype=torch.long)
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": case.mask.double(),
        "advantages": case.advantages,
        "old_per_token_logps": case.old,
        "ref_per_token_logps": case.reference,
        "num_items_in_batch": case.mask.sum(),
        **(inputs or {}),
    }
    return trainer._compute_loss(None, batch), trainer._metrics["train"]


@pytest.fixture
def case(unbounded):
    """TRL counts samples without a trained token in its means, so each has one here."""
    return unbounded.full()


def total(case, outputs, aggregation, length=None):
    return (case.weights(aggregation, length) * outputs.losses).sum()


AGGREGATIONS = {
    "grpo": ("sequence", None),
    "bnpo": ("token", None),
    "dapo": ("token", None),
    "dr_grpo": ("constant", 7),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_clipped_losses_and_aggregations(trl, case, same, name, dual_clip):
    """Its two-sided clipping with `delta` is dual clip."""
    theirs, metrics = loss_of(trl, case, loss_type=name, args={"delta": dual_clip})
    outputs = clipped(case.loss_inputs(), ClippedLoss(**OUR_CLIP, dual_clip=dual_clip))
    same(total(case, outputs, *AGGREGATIONS[name]), theirs, case.logprobs)
    if dual_clip is None:
        low, high = metrics["clip_ratio/low_mean"][0], metrics["clip_ratio/high_mean"][0]
        assert outputs.metrics["clip_low"].mean().item() == pytest.approx(low)
        assert outputs.metrics["clip_high"].mean().item() == pytest.approx(high)


def test_the_ratio_of_a_sequence_is_gspo(trl, case, same):
    """TRL has one advantage a sample."""
    inputs = case.loss_inputs()
    per_sample = case.segments.mean(inputs.advantages)
    theirs, _ = loss_of(
        trl, case, importance_sampling_level="sequence", inputs={"advantages": per_sample}, loss_type="grpo"
    )
    inputs = replace(inputs, advantages=case.segments.spread(per_sample))
    same(total(case, gspo(inputs, GSPO(**OUR_CLIP)), "sequence"), theirs, case.logprobs)


def test_cispo(trl, case, same):
    """Its epsilon_high bounds the ratio itself."""
    theirs, _ = loss_of(trl, case, loss_type="cispo", epsilon_high=1.5)
    same(total(case, cispo(case.loss_inputs(), CISPO(clip_high=0.5)), "token"), theirs, case.logprobs)


def test_sapo(trl, case, same):
    """Its temperatures are float32, so here they are numbers that float32 can hold."""
    theirs, _ = loss_of(trl, case, loss_type="sapo")
    same(total(case, sapo(case.loss_inputs(), SAPO(tau_negative=1.5)), "sequence"), theirs, case.logprobs)


@pytest.mark.parametrize("weighted", [False, True])
def test_kl_and_importance_weights(trl, case, same, weighted):
    """The weights multiply the policy's loss and leave the KL alone."""
    weights = (case.old - case.rollout).exp().clamp(max=1.3)
    theirs, metrics = loss_of(
        trl,
        case,
        beta=0.1,
        args={"use_bias_correction_kl": weighted},
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        inputs={"importance_sampling_ratio": weights},
    )
    options = ClippedLoss(**OUR_CLIP, kl_coef=0.1, kl_gradient="weighted" if weighted else "direct")
    outputs = Objective(loss=clipped, corrections=(("tis", tis, TIS(high=1.3)),))(case.loss_inputs(), options)
    same(total(case, outputs, "sequence"), theirs, case.logprobs)
    assert outputs.metrics["kl"].mean().item() == pytest.approx(metrics["kl"][0])


def test_entropy_bonus(trl, case, same):
    """TRL's bonus is a mean over tokens whatever the loss's aggregation; ours follows the aggregation."""
    theirs, _ = loss_of(trl, case, loss_type="dapo", _entropy_bonus_enabled=True, entropy_coef=0.3)
    outputs = Objective(loss=clipped)(case.loss_inputs(), ClippedLoss(**OUR_CLIP, entropy_coef=0.3))
    same(total(case, outputs, "token"), theirs, case.logprobs, case.entropy)


def test_opsm(trl, case):
    """TRL masks a sample by its one advantage."""
    per_sample = case.segments.mean(case.loss_inputs().advantages)
    expected = trl.grpo.get_off_policy_mask(per_sample[:, None], case.logprobs, case.rollout, case.mask.double(), 0.05)
    inputs = replace(case.correction_inputs(), advantages=case.segments.spread(per_sample))
    torch.testing.assert_close(opsm(inputs, OPSM(delta=0.05)).weights, case.segments.spread(expected[:, 0]))


# ---- What it makes of samples before it trains ----------------------------------------------------------------------


@pytest.fixture
def scored(trl, monkeypatch):
    """What its `_generate_and_score_completions` gives for samples that are already there, in float64."""

    def score(case, rewards, **settings):
        rows, columns = case.mask.shape
        ids = [[0] * columns] * rows
        generated = (ids, ids, case.mask.long().tolist(), [""] * rows, case.rollout.tolist(), {}, None, [])
        logged: dict[str, Any] = {"rewards": defaultdict(list), "extra": defaultdict(list)}
        defaults = {
            "accelerator": SimpleNamespace(device="cpu", process_index=0, gather=lambda one: one),
            "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
            "_tokenizer": SimpleNamespace(pad_token_id=0),
            "args": SimpleNamespace(
                per_device_train_batch_size=rows,
                steps_per_generation=1,
                gradient_accumulation_steps=1,
                gradient_checkpointing_kwargs=None,
            ),
            "reward_weights": torch.ones(rewards.shape[1]),
            "reward_funcs": [None] * rewards.shape[1],
            "reward_func_names": [str(number) for number in range(rewards.shape[1])],
            "multi_objective_aggregation": "sum_then_normalize",
            "scale_rewards": "group",
            "num_generations": 4,
            "num_iterations": 1,
            "beta": 0.0,
            "use_vllm": False,
            "vllm_importance_sampling_correction": True,
            "mask_truncated_completions": False,
            "pad_to_multiple_of": None,
            "_metrics": {"train": defaultdict(list)},
            "_logs": {"prompt": [], "completion": [], "advantages": [], **logged},
            **dict.fromkeys(["environment_factories", "environments", "tools"]),
            "_pending_extra_logs": {},
            "_pending_metrics": {},
        }
        trainer = trl.grpo.__new__(trl.grpo)
        for name, value in {**defaults, **settings}.items():
            setattr(trainer, name, value)
        trainer._generate = lambda prompts: generated
        trainer._calculate_rewards = lambda *_: rewards
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (case.old, None, None)
        torch.set_default_dtype(torch.float64)
        try:
            return trainer._generate_and_score_completions([{"prompt": ""}] * rows)
        finally:
            torch.set_default_dtype(torch.float32)

    return score


def compare_samples(case, ours, theirs):
    expected = theirs[:, None] * case.mask
    torch.testing.assert_close(case.padded(ours["advantages"]), expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("scale", "ours"),
    [
        ("group", lambda x: grpo(x, GRPOAdvantage(eps=1e-4))),
        ("batch", lambda x: grpo(x, GRPOAdvantage(eps=1e-4, scale="batch"))),
        ("none", lambda x: dr_grpo(x, InReward())),
    ],
)
def test_advantages(scored, make, scale, ours):
    case = make(1, whole=True)
    theirs = scored(case, case.rewards[:, None], scale_rewards=scale)["advantages"]
    compare_samples(case, ours(case.advantage_inputs()), theirs)


def test_gdpo_of_several_rewards(scored, make):
    """One reward is alike throughout a group, and one is missing for some samples."""
    case = make(2, whole=True)
    second = torch.linspace(-1, 1, 8, dtype=torch.float64).square()
    second[:4] = 0.5
    third = case.rewards.roll(3).clone()
    third[[1, 6]] = torch.nan
    parts, weights = {"a": case.rewards, "b": second, "c": third}, [1.0, 0.5, 2.0]
    theirs = scored(
        case,
        torch.stack(list(parts.values()), dim=1),
        multi_objective_aggregation="normalize_then_sum",
        reward_weights=torch.tensor(weights, dtype=torch.float64),
    )["advantages"]
    inputs = replace(case.advantage_inputs(parts), reward_weights=dict(zip(parts, weights, strict=True)))
    options = GDPO(eps_std=1e-4, whiten="samples", eps=1e-4, eps_added_to="deviation")
    compare_samples(case, gdpo(inputs, options), theirs)


@pytest.mark.parametrize(
    ("mode", "low", "options"),
    [
        ("token_truncate", None, TIS(high=1.3)),
        ("token_truncate", 0.8, TIS(how="clip", low=0.8, high=1.3)),
        ("token_mask", 0.8, TIS(how="mask", low=0.8, high=1.3)),
        ("sequence_truncate", None, TIS(level="sequence", high=1.3)),
        ("sequence_mask", 0.8, TIS(level="sequence", how="mask", low=0.8, high=1.3)),
    ],
)
def test_importance_weights(scored, case, mode, low, options):
    made = scored(
        case,
        case.rewards[:, None],
        use_vllm=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=1.3,
    )["importance_sampling_ratio"]
    expected = made.expand(case.mask.shape)[case.mask]
    assert expected.dtype == torch.float64
    torch.testing.assert_close(tis(case.correction_inputs(), options).weights, expected, atol=1e-8, rtol=1e-8)
