"""Against verl 0.9.1: aggregation, advantages, losses, KL estimators and corrections, values and gradients to 1e-8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from miles_core.config.schema import KLSection
from miles_core.run.kl import adapted
from miles_grpo.advantage.gdpo import gdpo
from miles_grpo.advantage.grpo import dr_grpo, grpo
from miles_grpo.advantage.opo import opo
from miles_grpo.advantage.reinforce import reinforce_plus_plus, reinforce_plus_plus_baseline
from miles_grpo.advantage.remax import remax
from miles_grpo.advantage.rloo import rloo
from miles_grpo.correction.mis import mis
from miles_grpo.correction.tis import tis
from miles_grpo.kl import kl_penalty
from miles_grpo.loss.cispo import cispo
from miles_grpo.loss.clipped import clipped
from miles_grpo.loss.covariance import clip_cov, kl_cov
from miles_grpo.loss.dppo import dppo
from miles_grpo.loss.geo_mean import geo_mean
from miles_grpo.loss.gspo import gspo, gspo_token
from miles_grpo.loss.reinforce import reinforce
from miles_grpo.loss.sapo import sapo
from miles_grpo.options import (
    CISPO,
    DPPO,
    GDPO,
    GSPO,
    MIS,
    SAPO,
    TIS,
    ClipCov,
    ClippedLoss,
    GeoMean,
    GRPOAdvantage,
    IcePop,
    InReward,
    KLCov,
    Reinforce,
    ReinforcePlusPlus,
)
from miles_ppo.advantage import gae
from miles_ppo.loss import critic
from miles_ppo.options import GAE, Critic

AGGREGATIONS = {
    "token": ("token-mean", None),
    "sequence": ("seq-mean-token-mean", None),
    "sequence-sum": ("seq-mean-token-sum", None),
    "constant": ("seq-mean-token-sum-norm", 7),
}


def test_adaptive_kl(verl):
    """The controller of the coefficient."""
    theirs, ours = verl.algos.AdaptiveKLController(0.3, target_kl=0.5, horizon=700), 0.3
    section = KLSection(target=0.5, horizon=700, per="token")
    for divergence in (0.1, 0.49, 0.52, 3.0, -1.0):
        theirs.update(current_kl=divergence, n_steps=64)
        ours = adapted(ours, divergence, 64, section)
        assert ours == pytest.approx(theirs.value, rel=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregation(verl, case, same, aggregation):
    """verl adds 1e-8 to the number of a sample's tokens in "seq-mean-token-mean", hence the looser bound there."""
    mode, length = AGGREGATIONS[aggregation]
    losses = case.logprobs.square()
    ours = (case.weights(aggregation, length) * losses[case.mask]).sum()
    theirs = verl.algos.agg_loss(losses, case.mask.double(), mode, loss_scale_factor=length)
    same(ours, theirs, case.logprobs, within=1e-7 if aggregation == "sequence" else 1e-8)


# ---- Advantages: where verl gives a group of one its reward, we give it 0 -------------------------------------------


def not_alone(case):
    """Trained tokens whose sample has siblings."""
    sizes = np.bincount(case.groups)[case.groups]
    return case.mask & torch.from_numpy(sizes > 1)[:, None]


def compare_groups(case, ours, theirs):
    padded = case.padded(ours["advantages"])
    here = not_alone(case)
    torch.testing.assert_close(padded[here], theirs[here], atol=1e-8, rtol=1e-8)
    assert (padded[case.mask & ~here] == 0).all()


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "rloo", "opo"])
def test_group_advantages(verl, case, name, kl_coef):
    """Without and with the KL in the reward (use_kl_in_reward)."""
    in_reward = InReward(kl_coef=kl_coef)
    ours, theirs, settings = {
        "grpo": (lambda x: grpo(x, GRPOAdvantage(kl_coef=kl_coef)), verl.algos.compute_grpo_outcome_advantage, {}),
        "dr-grpo": (
            lambda x: dr_grpo(x, in_reward),
            verl.algos.compute_grpo_outcome_advantage,
            {"norm_adv_by_std_in_grpo": False},
        ),
        "rloo": (lambda x: rloo(x, in_reward), verl.algos.compute_rloo_outcome_advantage, {}),
        "opo": (lambda x: opo(x, in_reward), verl.algos.compute_opo_outcome_advantage, {}),
    }[name]
    case = replace(case, rewards=case.rewards * case.mask.any(1))  # verl reads rewards off response tokens
    rewards = verl.algos.compute_rewards(case.token_rewards, case.old, case.reference, kl_coef) * case.mask
    expected, _ = theirs(rewards.clone(), case.mask.double(), case.groups, **settings)
    compare_groups(case, ours(case.advantage_inputs()), expected)


def test_rloo_vectorised_gives_a_group_of_one_nothing_as_we_do(verl, case):
    case = replace(case, rewards=case.rewards * case.mask.any(1))
    expected, _ = verl.algos.compute_rloo_vectorized_outcome_advantage(
        case.token_rewards, case.mask.double(), case.groups
    )
    ours = case.padded(rloo(case.advantage_inputs(), InReward())["advantages"])
    torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(verl, case, gamma):
    expected, _ = verl.algos.compute_reinforce_plus_plus_outcome_advantage(
        case.token_rewards, case.mask.double(), config=verl.algos.AlgoConfig(gamma=gamma)
    )
    ours = reinforce_plus_plus(case.advantage_inputs(), ReinforcePlusPlus(gamma=gamma))
    torch.testing.assert_close(case.padded(ours["advantages"]), expected, atol=1e-8, rtol=1e-8)


def test_reinforce_plus_plus_with_the_kl_in_the_reward(verl, case):
    rewards = verl.algos.compute_rewards(case.token_rewards, case.old, case.reference, 0.1) * case.mask
    expected, _ = verl.algos.compute_reinforce_plus_plus_outcome_advantage(
        rewards, case.mask.double(), config=verl.algos.AlgoConfig(gamma=0.9)
    )
    ours = reinforce_plus_plus(case.advantage_inputs(), ReinforcePlusPlus(gamma=0.9, kl_coef=0.1))
    torch.testing.assert_close(case.padded(ours["advantages"]), expected, atol=1e-8, rtol=1e-8)


def test_reinforce_plus_plus_baseline(verl, make):
    case = make(3, whole=True, empty=False)
    expected, _ = verl.algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
        case.token_rewards, case.mask.double(), case.groups
    )
    ours = reinforce_plus_plus_baseline(case.advantage_inputs(), ReinforcePlusPlus())
    torch.testing.assert_close(case.padded(ours["advantages"]), expected, atol=1e-8, rtol=1e-8)


def test_remax(verl, make):
    """The first sample of each group is the greedy one."""
    case = make(4, whole=True, empty=False)
    greedy = np.arange(len(case.groups)) % 4 == 0
    baselines = case.rewards[greedy][torch.from_numpy(case.groups)]
    expected, _ = verl.algos.compute_remax_outcome_advantage(case.token_rewards, baselines, case.mask.double())
    ours = case.padded(remax(replace(case.advantage_inputs(), baseline=greedy), InReward())["advantages"])
    here = case.mask & ~torch.from_numpy(greedy)[:, None]
    torch.testing.assert_close(ours[here], expected[here], atol=1e-8, rtol=1e-8)


def test_gdpo_of_one_reward(verl, make):
    case = make(5, whole=True, empty=False)
    expected, _ = verl.algos.compute_gdpo_outcome_advantage(case.token_rewards, case.mask.double(), case.groups)
    ours = gdpo(case.advantage_inputs({"a": case.rewards}), GDPO())
    torch.testing.assert_close(case.padded(ours["advantages"]), expected, atol=1e-8, rtol=1e-8)


def test_gdpo_of_two_rewards(verl, make):
    """verl takes several rewards in float32."""
    case = make(6, whole=True, empty=False)
    parts = {"a": case.rewards, "b": torch.linspace(-1, 1, 8, dtype=torch.float64).square()}
    scores = {name: part.numpy() for name, part in parts.items()}
    prompts = {"prompts": torch.zeros(8, 1), "attention_mask": torch.ones(8, 1 + case.mask.shape[1]).long()}
    # It puts a reward at the last response token, so that token must be one that counts.
    case = replace(case, mask=torch.ones_like(case.mask))
    expected, _ = verl.algos.compute_gdpo_outcome_advantage(
        case.token_rewards,
        case.mask.double(),
        case.groups,
        config={"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": [1.0, 0.5]},
        non_tensor_batch=scores,
        batch=prompts,
    )
    inputs = replace(case.advantage_inputs(parts), reward_weights={"a": 1.0, "b": 0.5})
    torch.testing.assert_close(case.padded(gdpo(inputs, GDPO())["advantages"]), expected.double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95)])
def test_gae(verl, case, gamma, lam):
    expected, returns = verl.algos.compute_gae_advantage_return(
        case.token_rewards, case.old_values, case.mask.double(), gamma, lam
    )
    ours = gae(case.advantage_inputs(), GAE(gamma=gamma, lam=lam))
    here = case.mask
    torch.testing.assert_close(case.padded(ours["advantages"])[here], expected[here], atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(case.padded(ours["returns"])[here], returns[here], atol=1e-8, rtol=1e-8)


# ---- Losses ---------------------------------------------------------------------------------------------------------

CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
OUR_CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
LOSSES: dict[str, Any] = {
    "vanilla": (clipped, ClippedLoss(**OUR_CLIP, dual_clip=3.0), {**CLIP, "clip_ratio_c": 3.0}),
    "gspo": (gspo_token, GSPO(**OUR_CLIP), CLIP),
    "cispo": (cispo, CISPO(**OUR_CLIP), CLIP),
    "sapo": (sapo, SAPO(tau_positive=1.0, tau_negative=1.05), {}),
    "gpg": (reinforce, Reinforce(), {}),
    "dppo_tv": (dppo, DPPO(bound_low=0.1, bound_high=0.15), {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}),
    "dppo_kl": (
        dppo,
        DPPO(divergence="kl", bound_low=0.02, bound_high=0.05, ratio_max=2.0),
        {"clip_ratio_low": 0.02, "clip_ratio_high": 0.05, "clip_ratio_c": 2.0},
    ),
}


def test_cases_are_what_their_names_say(make):
    """Where all is clipped nothing has a gradient; extreme ratios are beyond every bound on both sides."""
    case = make(clipped=True)
    outputs = clipped(case.loss_inputs(), ClippedLoss(**OUR_CLIP))
    assert (outputs.metrics["clip_low"] + outputs.metrics["clip_high"] == 1).all()
    assert not torch.autograd.grad(outputs.losses.sum(), case.logprobs)[0].any()
    case = make(spread=30.0, extreme=True)
    for other in (case.logprobs, case.rollout, case.reference):
        log_ratios = (other.detach() - case.old)[case.mask]
        assert log_ratios.min() < -20
        assert log_ratios.max() > 20


def within_the_bound_of_gspo(case):
    """Without the samples whose mean log-ratio is above 10, which is verl's bound in GSPO; ours is 20."""
    log_ratios = (case.logprobs.detach() - case.old) * case.mask
    within = log_ratios.sum(1) <= 10 * case.mask.sum(1)
    assert within.sum() > 4
    return replace(case, mask=case.mask & within[:, None])


@pytest.mark.parametrize("name", LOSSES)
def test_losses(verl, case, same, name):
    loss, options, settings = LOSSES[name]
    if name == "gspo":
        case = within_the_bound_of_gspo(case)
    if name.startswith("dppo"):
        settings = {"clip_ratio_c": 20.0, **settings}
    weights = case.weights("sequence-sum")
    mode = "seq-mean-token-sum"
    if name == "sapo":  # it aggregates by sequence whatever it is told
        weights = case.weights("sequence")
    theirs, metrics = verl.algos.get_policy_loss_fn(name)(
        case.old, case.logprobs, case.advantages, case.mask.double(), mode, verl.actor(**settings)
    )
    outputs = loss(case.loss_inputs(), options)
    ours = (weights * outputs.losses).sum()
    same(ours, theirs, case.logprobs)
    if name in ("vanilla", "gspo"):
        share = outputs.metrics["clip_low"].mean() + outputs.metrics["clip_high"].mean()
        assert metrics["actor/pg_clipfrac"] == pytest.approx(share.item(), abs=1e-6)


def test_gspo_of_a_sequence_equals_gspo_token_with_one_advantage_a_sequence(verl, case, same):
    case = within_the_bound_of_gspo(case)
    advantages = case.rewards[:, None] * case.mask
    case = replace(case, advantages=advantages)
    theirs, _ = verl.algos.get_policy_loss_fn("gspo")(
        case.old, case.logprobs, advantages, case.mask.double(), "seq-mean-token-sum", verl.actor(**CLIP)
    )
    segments = case.segments
    weights = case.weights("sequence") * segments.spread(segments.sum(torch.ones(len(segments.ids)).double()))
    ours = (weights * gspo(case.loss_inputs(), GSPO(**OUR_CLIP)).losses).sum()
    same(ours, theirs, case.logprobs)


def test_geo_mean(verl, case, same):
    """verl averages over all rows, also those without a token, and adds 1e-8 to each length."""
    case = case.full()
    theirs, _ = verl.algos.get_policy_loss_fn("geo_mean")(
        case.old, case.logprobs, case.advantages, case.mask.double(), config=verl.actor(**CLIP)
    )
    ours = (case.weights("sequence") * geo_mean(case.loss_inputs(), GeoMean(**OUR_CLIP)).losses).sum()
    same(ours, theirs, case.logprobs, within=1e-7)


def test_kl_cov(verl, unbounded, same):
    """verl bounds no log-ratio here."""
    case = unbounded
    config = verl.actor(policy_loss=verl.policy(kl_cov_ratio=0.2, ppo_kl_coef=0.7))
    theirs, _ = verl.algos.get_policy_loss_fn("kl_cov")(
        case.old, case.logprobs, case.advantages, case.mask.double(), "token-mean", config
    )
    ours = (case.weights("token") * kl_cov(case.loss_inputs(), KLCov(share=0.2, penalty=0.7)).losses).sum()
    same(ours, theirs, case.logprobs)


def test_clip_cov_where_nothing_is_left_to_chance(verl, unbounded, same):
    """As many tokens as there are candidates are dropped, none where all are clipped; verl bounds no log-ratio here."""
    case = unbounded
    config = verl.actor(**CLIP, policy_loss=verl.policy(clip_cov_ratio=1.0, clip_cov_lb=0.3, clip_cov_ub=5.0))
    theirs, metrics = verl.algos.get_policy_loss_fn("clip_cov")(
        case.old, case.logprobs, case.advantages, case.mask.double(), "token-mean", config
    )
    outputs = clip_cov(case.loss_inputs(), ClipCov(**OUR_CLIP, share=1.0, cov_low=0.3, cov_high=5.0))
    ours = (case.weights("token") * outputs.losses).sum()
    same(ours, theirs, case.logprobs)
    share = outputs.metrics["clip_cov"].mean().item()
    assert share == pytest.approx(metrics["actor/pg_clipfrac"], abs=1e-6)
    assert share > 0 or not torch.autograd.grad(ours, case.logprobs)[0].any()


def test_critic(verl, case, same):
    theirs, share = verl.algos.compute_value_loss(
        case.values, case.returns, case.old_values, case.mask.double(), 0.3, "token-mean"
    )
    outputs = critic(case.critic_inputs(), Critic(value_clip=0.3))
    ours = (case.weights("token") * outputs.losses).sum()
    same(ours, theirs, case.values)
    assert outputs.metrics["value_clip"].mean().item() == pytest.approx(share.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("theirs", "estimator", "gradient", "clamp"),
    [
        ("k1", "k1", "direct", None),
        ("abs", "abs", "direct", None),
        ("k2", "k2", "direct", None),
        ("k3", "k3", "direct", 10.0),
        ("k1+", "k1", "k2", None),
        ("k3+", "k3", "k2", 10.0),
    ],
)
def test_kl(verl, case, same, theirs, estimator, gradient, clamp):
    expected = verl.algos.kl_penalty(case.logprobs, case.reference, theirs)[case.mask].sum()
    ours = kl_penalty(
        case.logprobs[case.mask], case.reference[case.mask], None, estimator=estimator, gradient=gradient, clamp=clamp
    )
    same(ours.sum(), expected, case.logprobs)


# ---- Corrections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_importance_weights(verl, case, level, how):
    threshold = 1.5 if how == "truncate" else "0.7_1.5"
    weights, metrics = verl.correction.compute_rollout_correction_weights(
        case.old - case.rollout, case.mask.double(), level, threshold
    )
    options = TIS(level=level, how=how, low=0.0 if how == "truncate" else 0.7, high=1.5)
    outputs = tis(case.correction_inputs(), options)
    torch.testing.assert_close(outputs.weights, weights[case.mask], atol=1e-8, rtol=1e-8)
    if level == "token":
        assert metrics["rollout_is_mean"] == pytest.approx(outputs.weights.mean().item(), abs=1e-7)


def test_icepop(verl, case):
    weights, _ = verl.correction.compute_rollout_correction_weights(
        case.old - case.rollout, case.mask.double(), "token", "0.5_5.0"
    )
    ours = tis(case.correction_inputs(), IcePop()).weights
    torch.testing.assert_close(ours, weights[case.mask], atol=1e-8, rtol=1e-8)


LEVELS = ["token", "sequence-sum", "sequence-mean", "sequence-max"]
REJECTIONS = [(level, statistic) for level in LEVELS for statistic in ("ratio", "k2", "k3")]
REJECTIONS.remove(("sequence-max", "ratio"))  # which verl does not have


@pytest.mark.parametrize(("level", "statistic"), REJECTIONS)
def test_rejection(verl, case, level, statistic):
    """verl's k1 bounds rollout over trainer, ours trainer over rollout, so the bounds turn round."""
    name = {"token": "token", "sequence-sum": "seq_sum", "sequence-mean": "seq_mean", "sequence-max": "seq_max"}[level]
    option = f"{name}_{'k1' if statistic == 'ratio' else statistic}"
    threshold = f"{1 / 1.3}_{1 / 0.8}" if statistic == "ratio" else "0.04"
    kept, metrics = verl.correction.compute_rollout_rejection_mask(
        case.old - case.rollout, case.mask.double(), option, threshold
    )
    low, high = (0.8, 1.3) if statistic == "ratio" else (0.0, 0.04)
    options = MIS(statistic=statistic, level=level, low=low, high=high, weighted=False)
    outputs = mis(case.correction_inputs(), options)
    torch.testing.assert_close(outputs.weights, kept[case.mask])
    share = outputs.metrics["masked"].mean().item()
    assert metrics["rollout_rs_masked_fraction"] == pytest.approx(share, abs=1e-6)
