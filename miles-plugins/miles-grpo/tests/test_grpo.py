"""GRPO's advantage and loss against plain references, their gradients, and hostile input."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_core.roles import AdvantageInputs, Segments
from miles_grpo.advantage.grpo import grpo
from miles_grpo.kl import kl_estimate
from miles_grpo.loss.clipped import clipped
from miles_grpo.options import ClippedLoss, GRPOAdvantage


def packed(rewards: list[float], groups: list[int], lengths: list[int]) -> AdvantageInputs:
    """Samples of one prompt token and `length` trained ones."""
    return AdvantageInputs(
        rewards=np.array(rewards, np.float64),
        reward_parts={},
        groups=np.array(groups, np.int64),
        segment_ids=np.repeat(np.arange(len(lengths)), np.array(lengths) + 1),
        mask=np.concatenate([[False] + [True] * length for length in lengths]),
    )


@given(
    samples=st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12),
    std=st.sampled_from(["sample", "population"]),
    eps=st.sampled_from([1e-6, 1e-4]),
)
def test_grpo_advantage_equals_the_definition(samples, std, eps):
    rewards, groups, lengths = (list(column) for column in zip(*samples, strict=True))
    got = grpo(packed(rewards, groups, lengths), GRPOAdvantage(std=std, eps=eps))["advantages"]
    deviation = statistics.stdev if std == "sample" else statistics.pstdev
    expected = []
    for reward, group, length in samples:
        siblings = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        scale = deviation(siblings) if len(siblings) > 1 else 0.0
        expected += [0.0] + [(reward - statistics.fmean(siblings)) / (scale + eps)] * length
    np.testing.assert_allclose(got, expected, atol=1e-8, rtol=1e-8)


def test_a_group_of_one_and_a_group_of_equals_have_no_advantage():
    got = grpo(packed([3.0, 1.0, 1.0], [0, 1, 1], [2, 2, 1]), GRPOAdvantage())["advantages"]
    assert not got.any()


def reference_loss(logprob, old, ref, advantage, options):
    """One token, in plain Python."""
    ratio = math.exp(logprob - old)
    clipped_ratio = min(max(ratio, 1 - options.clip_low), 1 + options.clip_high)
    loss = -min(ratio * advantage, clipped_ratio * advantage)
    if options.dual_clip is not None and advantage < 0:
        loss = min(loss, -options.dual_clip * advantage)
    d = logprob - ref
    kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[options.kl_estimator]
    return loss + options.kl_coef * kl


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_loss_equals_the_definition_token_by_token(loss_inputs, estimator, dual_clip, spread):
    options = ClippedLoss(clip_low=0.1, clip_high=0.28, dual_clip=dual_clip, kl_coef=0.3, kl_estimator=estimator)
    inputs = loss_inputs(spread=spread)
    columns = (inputs.logprobs, inputs.old_logprobs, inputs.ref_logprobs, inputs.advantages)
    expected = [reference_loss(*row, options) for row in zip(*(c.tolist() for c in columns), strict=True)]
    torch.testing.assert_close(clipped(inputs, options).losses.tolist(), expected, atol=1e-10, rtol=1e-10)


def test_gradient_is_that_of_finite_differences(loss_inputs):
    inputs = loss_inputs((2, 3), seed=1)
    options = ClippedLoss(kl_coef=0.1, dual_clip=3.0)
    assert torch.autograd.gradcheck(lambda x: clipped(replace(inputs, logprobs=x), options).losses, inputs.logprobs)


def test_on_policy_the_gradient_is_that_of_reinforce(loss_inputs):
    inputs = loss_inputs()
    inputs = replace(inputs, old_logprobs=inputs.logprobs.detach())
    output = clipped(inputs, ClippedLoss())
    (gradient,) = torch.autograd.grad(output.losses.sum(), inputs.logprobs)
    torch.testing.assert_close(gradient, -inputs.advantages)
    assert output.metrics["ppo_kl"].abs().max() == 0
    assert output.metrics["clip_low"].sum() == output.metrics["clip_high"].sum() == 0


def test_a_clipped_token_has_no_gradient_and_is_counted_on_its_side(loss_inputs):
    base = loss_inputs((4,))
    old = base.logprobs.detach() + torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    output = clipped(replace(base, old_logprobs=old, advantages=advantages), ClippedLoss())
    (gradient,) = torch.autograd.grad(output.losses.sum(), base.logprobs)
    assert (gradient == 0).tolist() == [True, True, False, False]
    assert output.metrics["clip_low"].tolist() == [1, 0, 0, 0]
    assert output.metrics["clip_high"].tolist() == [0, 1, 0, 0]


def test_extreme_log_ratios_stay_finite(loss_inputs):
    base = loss_inputs((4,))
    old = base.logprobs.detach() + torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=torch.float64)
    advantages = torch.tensor([0.0, 0.0, -2.0, -2.0], dtype=torch.float64)
    inputs = replace(base, old_logprobs=old, ref_logprobs=old, advantages=advantages)
    output = clipped(inputs, ClippedLoss(kl_coef=0.1))
    (gradient,) = torch.autograd.grad(output.losses.sum(), base.logprobs)
    assert output.losses.isfinite().all()
    assert gradient.isfinite().all()


def test_no_tokens_give_no_losses(loss_inputs):
    empty = loss_inputs(())
    assert clipped(replace(empty, segments=Segments(ids=empty.segments.ids, count=0)), ClippedLoss()).losses.shape == (
        0,
    )


def test_k2_and_k3_estimate_the_kl_divergence_of_two_distributions():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    expected = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        mean = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()
        torch.testing.assert_close(mean, expected)


def test_the_gradient_of_k2_is_that_of_the_true_kl():
    logits = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    weighted = policy.exp().detach() * kl_estimate(policy, reference, "k2")
    (got,) = torch.autograd.grad(weighted.sum(), logits)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GRPOAdvantage(eps=0), "eps must be positive"),
        (lambda: ClippedLoss(clip_low=1.5), r"clip_low must be in \[0, 1\]"),
        (lambda: ClippedLoss(clip_high=-1), "clip_high must not be negative"),
        (lambda: ClippedLoss(dual_clip=1.0), "dual_clip must be above 1"),
        (lambda: ClippedLoss(kl_coef=-0.1), "kl_coef must not be negative"),
    ],
)
def test_options_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
