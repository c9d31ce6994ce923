"""The advantage `reverse-kl` against plain references, and its gradient against that of the true divergence."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_core.roles import AdvantageInputs, LossInputs, Segments
from miles_distill.advantage import reverse_kl
from miles_distill.options import ReverseKL
from miles_grpo.loss.reinforce import reinforce
from miles_grpo.options import Reinforce

torch.set_num_threads(1)

rewards = st.floats(-5, 5).map(lambda x: round(x, 3))
masks = st.lists(st.booleans(), min_size=1, max_size=6).map(lambda mask: [False, *mask])
samples = st.lists(st.tuples(rewards, st.integers(0, 2), masks), min_size=1, max_size=10)


def packed(rows) -> AdvantageInputs:
    """Inputs of (reward, group, mask) rows, with random columns."""
    total = sum(len(mask) for *_, mask in rows)
    generator = np.random.default_rng(0)
    return AdvantageInputs(
        rewards=np.array([reward for reward, *_ in rows], np.float64),
        reward_parts={},
        groups=np.array([group for _, group, _ in rows]),
        segment_ids=np.repeat(np.arange(len(rows)), [len(mask) for *_, mask in rows]),
        mask=np.concatenate([np.array(mask, bool) for *_, mask in rows]),
        columns={
            name: -generator.exponential(2.0, total)
            for name in ("rollout_logprobs", "old_logprobs", "teacher_logprobs")
        },
    )


@given(
    rows=samples,
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    clamp=st.sampled_from([None, 0.5]),
    recompute=st.booleans(),
)
def test_each_token_is_worth_what_the_teacher_says(rows, gamma, clamp, recompute):
    inputs = packed(rows)
    policy = inputs.columns["old_logprobs" if recompute else "rollout_logprobs"]
    bound = clamp or float("inf")
    expected, start = [], 0
    for _, _, mask in rows:
        told = [inputs.columns["teacher_logprobs"][start + t] - policy[start + t] for t in range(len(mask))]
        told = [max(-bound, min(bound, d)) for d in told]
        trained = [t for t, m in enumerate(mask) if m]
        for t, m in enumerate(mask):
            later = [told[u] for u in trained if u >= t]
            expected.append(sum(gamma**k * d for k, d in enumerate(later)) if m else 0.0)
        start += len(mask)
    got = reverse_kl(inputs, ReverseKL(gamma=gamma, clamp=clamp, recompute=recompute))
    np.testing.assert_allclose(got["advantages"], expected, atol=1e-8, rtol=1e-8)


@given(rows=samples.filter(lambda rows: len({group for _, group, _ in rows}) < len(rows)))
def test_a_reward_is_normalised_and_added(rows):
    inputs = packed(rows)
    without = reverse_kl(inputs, ReverseKL())["advantages"]
    expected = []
    for reward, group, mask in rows:
        siblings = [row[0] for row in rows if row[1] == group]
        deviation = statistics.stdev(siblings) if len(siblings) > 1 else 0.0
        value = 0.3 * (reward - statistics.fmean(siblings)) / (deviation + 1e-6)
        expected += [value if m else 0.0 for m in mask]
    got = reverse_kl(inputs, ReverseKL(reward_coef=0.3))["advantages"] - without
    np.testing.assert_allclose(got, expected, atol=1e-8, rtol=1e-8)


def test_a_reward_with_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="samples_per_prompt to 2 or more"):
        reverse_kl(packed([(1.0, 0, [False, True]), (0.0, 1, [False, True])]), ReverseKL(reward_coef=0.3))


def test_no_token_and_no_sample_give_nothing():
    assert (reverse_kl(packed([(1.0, 0, [False, False])]), ReverseKL(gamma=1.0))["advantages"] == 0).all()


def test_the_policy_gradient_is_that_of_the_reverse_kl():
    """In expectation over the tokens that the policy may draw, which can be summed over a small vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    policy, teacher = logits.log_softmax(0), other.log_softmax(0)
    (true,) = torch.autograd.grad((policy.exp() * (policy - teacher)).sum(), logits, retain_graph=True)

    rows = [(0.0, token, [False, True]) for token in range(7)]  # each token once, as a sample of its own
    columns = {"rollout_logprobs": policy, "teacher_logprobs": teacher}
    spread = {name: np.repeat(column.detach().numpy(), 2) for name, column in columns.items()}
    inputs = packed(rows)
    inputs.columns.update(spread)
    advantages = torch.from_numpy(reverse_kl(inputs, ReverseKL())["advantages"][inputs.mask])
    segments = Segments(ids=torch.arange(7), count=7)
    losses = reinforce(LossInputs(logprobs=policy, segments=segments, advantages=advantages), Reinforce()).losses
    (got,) = torch.autograd.grad((policy.detach().exp() * losses).sum(), logits)
    torch.testing.assert_close(got, true, atol=1e-8, rtol=1e-8)
