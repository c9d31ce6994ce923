"""Against OpenRLHF 0.11.2: aggregation, advantages, losses, KL estimators and corrections, to 1e-8."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miles_grpo.advantage.grpo import dr_grpo, grpo
from miles_grpo.advantage.reinforce import reinforce_plus_plus, reinforce_plus_plus_baseline
from miles_grpo.advantage.rloo import rloo
from miles_grpo.correction.mis import mis
from miles_grpo.correction.tis import tis
from miles_grpo.kl import kl_penalty
from miles_grpo.loss.clipped import clipped
from miles_grpo.loss.gspo import gspo
from miles_grpo.options import GSPO, MIS, TIS, ClippedLoss, GRPOAdvantage, IcePop, InReward, ReinforcePlusPlus
from miles_ppo.advantage import gae
from miles_ppo.loss import critic
from miles_ppo.options import GAE, Critic
from miles_sft.loss import sft

OUR_CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
POPULATION: dict[str, Any] = {"variance": "population", "eps": 1e-16}
"""OpenRLHF takes the larger of the variance and 1e-8, which is the variance unless all returns are equal."""


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_clipped_loss(openrlhf, case, same, aggregation, dual_clip):
    module = openrlhf.loss.PolicyLoss(**CLIP, dual_clip=dual_clip, token_level_loss=aggregation == "token")
    theirs, clip_share, ppo_kl, _, _ = module(case.logprobs, case.old, case.advantages, case.mask.double())
    outputs = clipped(case.loss_inputs(), ClippedLoss(**OUR_CLIP, dual_clip=dual_clip))
    ours = (case.weights(aggregation) * outputs.losses).sum()
    same(ours, theirs, case.logprobs, within=1e-8 if aggregation == "token" else 1e-7)
    share = (outputs.metrics["clip_low"] + outputs.metrics["clip_high"]).mean()
    torch.testing.assert_close(share, clip_share.double())
    torch.testing.assert_close(outputs.metrics["ppo_kl"].mean(), ppo_kl)


def test_gspo(openrlhf, case, same):
    module = openrlhf.loss.PolicyLoss(**CLIP, policy_loss_type="gspo")
    theirs = module(case.logprobs, case.old, case.advantages, case.mask.double())[0]
    ours = (case.weights("sequence") * gspo(case.loss_inputs(), GSPO(**OUR_CLIP)).losses).sum()
    same(ours, theirs, case.logprobs, within=1e-7)


@pytest.mark.parametrize(
    ("settings", "correction", "options"),
    [
        ({"level": "token", "mode": "clip"}, tis, TIS(how="clip", low=0.9, high=1.1)),
        ({"level": "token", "mode": "mask"}, tis, IcePop(low=0.9, high=1.1)),
        ({"level": "seq", "mode": "mask"}, mis, MIS(level="sequence-mean", low=0.9, high=1.1)),
    ],
)
def test_corrections(openrlhf, make, same, settings, correction, options):
    case = make(1, empty=False)
    module = openrlhf.loss.PolicyLoss(
        **CLIP,
        is_correction_level=settings["level"],
        is_correction_mode=settings["mode"],
        is_correction_threshold=(0.9, 1.1),
    )
    theirs = module(case.logprobs, case.old, case.advantages, case.mask.double(), case.rollout)[0]
    losses = clipped(case.loss_inputs(), ClippedLoss(**OUR_CLIP)).losses
    weights = correction(case.correction_inputs(), options).weights
    assert 0 < ((weights == 0) | (weights == 0.9) | (weights == 1.1)).sum() < len(weights)
    same((case.weights("token") * losses * weights).sum(), theirs, case.logprobs)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_critic(openrlhf, case, same, clip):
    theirs = openrlhf.loss.ValueLoss(clip)(case.values, case.old_values, case.returns, case.mask.double())
    outputs = critic(case.critic_inputs(), Critic(value_clip=clip))
    same((case.weights("token") * outputs.losses).sum(), theirs, case.values)


def test_sft(openrlhf, case, same):
    theirs = openrlhf.loss.SFTLoss()(case.logprobs, case.mask.double())
    same((case.weights("token") * sft(case.loss_inputs(), None).losses).sum(), theirs, case.logprobs)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_kl(openrlhf, unbounded, same, estimator, unbiased):
    """The weight of its unbiased gradient has no lower bound."""
    case = unbounded
    theirs = openrlhf.models.compute_approx_kl(
        case.logprobs, case.reference, case.old, kl_estimator=estimator, unbiased_gradient=unbiased
    )
    ours = kl_penalty(
        case.logprobs[case.mask],
        case.reference[case.mask],
        case.old[case.mask],
        estimator=estimator,
        gradient="k2-weighted" if unbiased else "direct",
        clamp=10.0,
    )
    same(ours.sum(), theirs[case.mask].sum(), case.logprobs)


# ---- Advantages -----------------------------------------------------------------------------------------------------


def advantages_of(openrlhf, case, estimator, *, gamma=1.0, lam=1.0, kl_coef=0.0):
    """What its experience maker makes of a batch."""
    advantage = SimpleNamespace(estimator=estimator, gamma=gamma, lambd=lam, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(clip_range=None),
        rollout=SimpleNamespace(n_samples_per_prompt=4),
    )
    maker = openrlhf.maker.__new__(openrlhf.maker)
    maker.strategy, maker.advantage_estimator = SimpleNamespace(args=args), estimator
    maker.kl_ctl = SimpleNamespace(value=kl_coef)
    experience = SimpleNamespace(
        rewards=case.rewards.clone(),
        index=list(range(len(case.rewards))),
        action_mask=case.mask,
        kl=case.old - case.reference,
        values=case.old_values,
        info={},
    )
    maker.compute_advantages_and_returns([experience])
    return experience


@pytest.fixture
def whole(make):
    """Two groups of four samples."""
    return make(2, whole=True, empty=False)


@pytest.mark.parametrize(
    ("estimator", "ours"),
    [
        ("group_norm", lambda x: grpo(x, GRPOAdvantage(eps=1e-9))),
        ("dr_grpo", lambda x: dr_grpo(x, InReward())),
        ("rloo", lambda x: rloo(x, InReward())),
        ("reinforce", lambda x: reinforce_plus_plus(x, ReinforcePlusPlus(**POPULATION))),
        ("reinforce_baseline", lambda x: reinforce_plus_plus_baseline(x, ReinforcePlusPlus(**POPULATION))),
    ],
)
def test_advantages(openrlhf, whole, estimator, ours):
    theirs = advantages_of(openrlhf, whole, estimator).advantages
    here = whole.mask
    torch.testing.assert_close(
        whole.padded(ours(whole.advantage_inputs())["advantages"])[here], theirs[here], atol=1e-8, rtol=1e-8
    )


@pytest.mark.parametrize("baseline", [False, True])
def test_returns_with_the_kl_in_the_reward(openrlhf, whole, baseline):
    """OpenRLHF counts tool output as steps when it discounts, we do not, so there is no gap and no discount here."""
    estimator = "reinforce_baseline" if baseline else "reinforce"
    theirs = advantages_of(openrlhf, whole, estimator, kl_coef=0.1).advantages
    function = reinforce_plus_plus_baseline if baseline else reinforce_plus_plus
    ours = function(whole.advantage_inputs(), ReinforcePlusPlus(**POPULATION, kl_coef=0.1))
    here = whole.mask
    torch.testing.assert_close(whole.padded(ours["advantages"])[here], theirs[here], atol=1e-8, rtol=1e-8)


def test_discounted_returns_of_one_turn(openrlhf, whole):
    columns = torch.arange(whole.mask.shape[1])
    whole = replace(whole, mask=columns <= whole.last[:, None])
    theirs = advantages_of(openrlhf, whole, "reinforce", gamma=0.9).advantages
    ours = reinforce_plus_plus(whole.advantage_inputs(), ReinforcePlusPlus(**POPULATION, gamma=0.9))
    here = whole.mask
    torch.testing.assert_close(whole.padded(ours["advantages"])[here], theirs[here], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9)])
def test_gae_with_discounts_between_turns(openrlhf, whole, gamma, lam):
    theirs = advantages_of(openrlhf, whole, "gae", gamma=gamma, lam=lam, kl_coef=0.1)
    options = GAE(**POPULATION, gamma=gamma, lam=lam, between_turns="discount", kl_coef=0.1)
    ours, here = gae(whole.advantage_inputs(), options), whole.mask
    torch.testing.assert_close(whole.padded(ours["advantages"])[here], theirs.advantages[here], atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(whole.padded(ours["returns"])[here], theirs.returns[here], atol=1e-8, rtol=1e-8)
