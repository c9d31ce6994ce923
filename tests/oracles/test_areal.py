"""Against AReaL 1.0.4: decoupled PPO, GSPO, SAPO, rejection sampling, critic and normalisation, to 1e-8."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miles_core.roles import LossOutputs
from miles_core.run.objective import Objective
from miles_grpo.advantage.grpo import dr_grpo, grpo
from miles_grpo.advantage.rloo import rloo
from miles_grpo.advantage.whiten import whitened
from miles_grpo.correction.mis import mis
from miles_grpo.correction.tis import tis
from miles_grpo.loss.clipped import clipped
from miles_grpo.loss.gspo import gspo
from miles_grpo.loss.sapo import sapo
from miles_grpo.options import GSPO, MIS, SAPO, TIS, ClippedLoss, GRPOAdvantage, InReward, WhitenOptions
from miles_ppo.loss import critic
from miles_ppo.options import Critic
from miles_rewards.length import LengthPenalty
from miles_rewards.options import LengthPenalty as LengthPenaltyOptions


@pytest.fixture
def case(unbounded):
    """AReaL does not bound log-ratios."""
    return unbounded


def sampling(level, action, metric, agg="mean", *, low=None, high):
    """Its RejectionSamplingConfig."""
    return SimpleNamespace(level=level, action=action, metric=metric, agg=agg, upper=high, lower=low)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("decoupled", [False, True])
def test_decoupled_ppo(areal, case, same, dual_clip, decoupled):
    """Its third policy, the one that wrote the tokens, is our correction."""
    theirs, _ = areal.functional.ppo_actor_loss_fn(
        case.logprobs,
        case.old,
        case.rollout,
        case.advantages,
        0.2,
        case.mask,
        eps_clip_higher=0.28,
        c_clip=dual_clip,
        rejection_sampling=sampling("token", "clamp", "ratio", low=0.0, high=1.3) if decoupled else None,
    )
    losses = clipped(case.loss_inputs(), ClippedLoss(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)).losses
    if decoupled:
        losses = losses * tis(case.correction_inputs(), TIS(high=1.3)).weights
    same((case.weights("token") * losses).sum(), theirs, case.logprobs)


def test_the_old_policy_by_interpolation(areal, case):
    """Its current version is the one that the update makes, and the one before it is the last that was published."""
    published = 5
    versions = torch.arange(case.mask.numel()).reshape(case.mask.shape) % (published + 1)
    expected = areal.actor.compute_prox_logp_approximations(
        case.rollout, case.logprobs.detach(), versions, published + 1, method="loglinear"
    )["loglinear"]

    def old(inputs, options):
        return LossOutputs(losses=inputs.old_logprobs)

    staleness = (published - versions)[case.mask].double()
    outputs = Objective(loss=old, old_policy="interpolate")(replace(case.loss_inputs(), staleness=staleness), None)
    torch.testing.assert_close(outputs.losses, expected[case.mask], atol=1e-8, rtol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("action", ["mask", "clamp"])
def test_ratio_weights(areal, case, level, action):
    """By sequence its weight is the geometric mean."""
    result = areal.functional.apply_rejection_sampling(
        case.old, case.rollout, case.mask, None, sampling(level, action, "ratio", low=0.8, high=1.2)
    )
    names: dict[str, Any] = {"mask": "mask", "clamp": "clip", "token": "token", "sequence": "geometric"}
    options = TIS(level=names[level], how=names[action], low=0.8, high=1.2)
    outputs = tis(case.correction_inputs(), options)
    torch.testing.assert_close(outputs.weights, result.behave_imp_weight[case.mask], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("metric", ["kl_k2", "kl_k3"])
@pytest.mark.parametrize("level", ["token", "sequence-sum", "sequence-mean", "sequence-max"])
def test_rejection(areal, case, metric, level):
    """Its k3 takes the samples to be the trainer's: exp(-d) - 1 + d where ours and verl's is exp(d) - 1 - d."""
    kind, _, agg = level.partition("-")
    result = areal.functional.apply_rejection_sampling(
        *((case.rollout, case.old) if metric == "kl_k3" else (case.old, case.rollout)),
        case.mask,
        None,
        sampling(kind, "mask", metric, agg or "mean", high=0.04),
    )
    options = MIS(statistic=metric[3:], level=level, low=0.0, high=0.04, weighted=False)
    outputs = mis(case.correction_inputs(), options)
    torch.testing.assert_close(outputs.weights, result.loss_mask[case.mask].double())
    assert outputs.metrics["masked"].mean().item() == pytest.approx(result.filtered_fraction)


def test_gspo(areal, case, same):
    """It gives each token the mean of its sequence's advantages."""
    theirs, _ = areal.functional.ppo_actor_loss_fn(
        case.logprobs, case.old, case.old, case.advantages, 0.2, case.mask, importance_sampling_level="sequence"
    )
    inputs = case.loss_inputs()
    of_sequence = case.segments.spread(case.segments.mean(inputs.advantages))
    losses = gspo(replace(inputs, advantages=of_sequence), GSPO(clip_low=0.2, clip_high=0.2))
    same((case.weights("token") * losses.losses).sum(), theirs, case.logprobs)


def test_sapo(areal, case, same):
    theirs, _ = areal.functional.sapo_loss_fn(case.logprobs, case.old, case.advantages, 1.0, 1.05, case.mask)
    same((case.weights("token") * sapo(case.loss_inputs(), SAPO()).losses).sum(), theirs, case.logprobs)


def test_critic(areal, make):
    """It asks for float32."""
    case = make(1)
    columns = [column.detach().to(torch.float32) for column in (case.values, case.old_values, case.returns)]
    theirs, _ = areal.functional.ppo_critic_loss_fn(*columns, 0.3, case.mask)
    ours = (case.weights("token") * critic(case.critic_inputs(), Critic(value_clip=0.3)).losses).sum()
    torch.testing.assert_close(ours.detach(), theirs.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"std_unbiased": True}, lambda x: grpo(x, GRPOAdvantage(eps=1e-5))),
        ({"std_unbiased": False}, lambda x: grpo(x, GRPOAdvantage(std="population", eps=1e-5))),
        ({"std_level": "batch"}, lambda x: grpo(x, GRPOAdvantage(eps=1e-5, scale="batch"))),
        ({"std_level": None}, lambda x: dr_grpo(x, InReward())),
        ({"std_level": None, "mean_leave1out": True}, lambda x: rloo(x, InReward())),
    ],
)
def test_reward_normalisation(areal, make, settings, ours):
    """Its std_level "batch" squares distances to the group's mean, ours to the batch's, so here these are the same."""
    case = make(1, whole=True, empty=False)
    case = replace(case, rewards=case.rewards - case.rewards.reshape(2, 4).mean(1).repeat_interleave(4))
    defaults = {"mean_level": "group", "mean_leave1out": False, "std_level": "group", "std_unbiased": True}
    config = SimpleNamespace(**{**defaults, **settings}, group_size=4, eps=1e-5)
    theirs = areal.data.Normalization(config)(case.rewards)
    padded = case.padded(ours(case.advantage_inputs())["advantages"])
    torch.testing.assert_close(padded, theirs[:, None] * case.mask, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening(areal, case, unbiased):
    theirs = areal.functional.masked_normalization(case.returns, case.mask, unbiased=unbiased, all_reduce=False)
    options = WhitenOptions(variance="sample" if unbiased else "population", eps=1e-5, eps_added_to="deviation")
    ours = whitened(case.returns.reshape(-1).numpy(), case.mask.reshape(-1).numpy(), options)
    torch.testing.assert_close(case.padded(ours)[case.mask], theirs[case.mask], atol=1e-8, rtol=1e-8)


def test_overlong_penalty(areal, case):
    """No response is longer than the limit, below which it never reaches -1."""
    data = {"rewards": torch.zeros(8).double(), "input_ids": case.mask, "loss_mask": case.mask}
    theirs = areal.functional.reward_overlong_penalty(data, 6, 1.0, 9)["rewards"]
    samples: list[Any] = [SimpleNamespace(mask=row.numpy()) for row in case.mask]
    ours = LengthPenalty(LengthPenaltyOptions(max_tokens=9, cache=6)).score(samples)
    assert min(ours) < 0
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs)
