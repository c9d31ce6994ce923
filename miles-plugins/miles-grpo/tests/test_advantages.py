"""Every advantage against a reference in plain Python, over random groups, lengths and masks with gaps."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.roles import AdvantageInputs
from miles_grpo.advantage.gdpo import gdpo
from miles_grpo.advantage.grpo import dr_grpo, grpo
from miles_grpo.advantage.opo import opo
from miles_grpo.advantage.reinforce import reinforce_plus_plus, reinforce_plus_plus_baseline
from miles_grpo.advantage.remax import remax
from miles_grpo.advantage.rloo import rloo
from miles_grpo.advantage.scan import discounted
from miles_grpo.options import GDPO, GRPOAdvantage, InReward, ReinforcePlusPlus

rewards = st.floats(-5, 5).map(lambda x: round(x, 3))
masks = st.lists(st.booleans(), min_size=1, max_size=5).map(lambda mask: [False, *mask])
samples = st.lists(st.tuples(rewards, st.integers(0, 3), masks), min_size=1, max_size=12)


def packed(rows, **more) -> AdvantageInputs:
    """Inputs of (reward, group, mask) rows."""
    return AdvantageInputs(
        rewards=np.array([row[0] for row in rows], np.float64),
        reward_parts=more.pop("reward_parts", {}),
        groups=np.array([row[1] for row in rows], np.int64),
        segment_ids=np.repeat(np.arange(len(rows)), [len(row[2]) for row in rows]),
        mask=np.concatenate([np.array(row[2], bool) for row in rows]),
        **more,
    )


def siblings(rows, group):
    return [row for row in rows if row[1] == group]


def check(got, rows, per_sample):
    """Each trained token has its sample's value, every other token 0."""
    expected = [value if m else 0.0 for value, row in zip(per_sample, rows, strict=True) for m in row[2]]
    np.testing.assert_allclose(got["advantages"], expected, atol=1e-8, rtol=1e-8)


def deviation(values, std):
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) if std == "sample" else statistics.pstdev(values)


@given(rows=samples, std=st.sampled_from(["sample", "population"]), eps=st.sampled_from([1e-6, 1e-4]))
def test_grpo(rows, std, eps):
    expected = []
    for reward, group, _ in rows:
        of_group = [row[0] for row in siblings(rows, group)]
        expected.append((reward - statistics.fmean(of_group)) / (deviation(of_group, std) + eps))
    check(grpo(packed(rows), GRPOAdvantage(std=std, eps=eps)), rows, expected)


@given(rows=samples, std=st.sampled_from(["sample", "population"]))
def test_grpo_scaled_by_the_batch(rows, std):
    scale = deviation([row[0] for row in rows], std) + 1e-4
    expected = [(row[0] - statistics.fmean(r[0] for r in siblings(rows, row[1]))) / scale for row in rows]
    check(grpo(packed(rows), GRPOAdvantage(std=std, eps=1e-4, scale="batch")), rows, expected)


@given(rows=samples)
def test_dr_grpo(rows):
    expected = [row[0] - statistics.fmean(r[0] for r in siblings(rows, row[1])) for row in rows]
    check(dr_grpo(packed(rows), InReward()), rows, expected)


@given(rows=samples)
def test_rloo_is_the_reward_minus_the_mean_of_the_others(rows):
    expected = []
    for place, (reward, group, _) in enumerate(rows):
        others = [row[0] for number, row in enumerate(rows) if row[1] == group and number != place]
        expected.append(reward - statistics.fmean(others) if others else 0.0)
    check(rloo(packed(rows), InReward()), rows, expected)


@given(rows=samples)
def test_opo_weighs_the_baseline_by_length(rows):
    expected = []
    for reward, group, _ in rows:
        weighed = [(sum(row[2]), row[0]) for row in siblings(rows, group)]
        length = sum(n for n, _ in weighed)
        expected.append(reward - sum(n * r for n, r in weighed) / length if length else reward)
    check(opo(packed(rows), InReward()), rows, expected)


@given(rows=samples, baselines=st.sets(st.integers(0, 11)))
def test_remax_compares_with_the_baseline_of_the_same_prompt(rows, baselines):
    is_baseline = np.array([number in baselines for number in range(len(rows))])
    expected = []
    for reward, group, _ in rows:
        of_group = [row[0] for number, row in enumerate(rows) if row[1] == group and number in baselines]
        expected.append(reward - statistics.fmean(of_group) if of_group else 0.0)
    check(remax(packed(rows, baseline=is_baseline), InReward()), rows, expected)


# ---- Returns and whitening ------------------------------------------------------------------------------------------


@given(
    values=st.lists(st.tuples(st.floats(-3, 3), st.sampled_from([0.0, 0.5, 0.9, 1.0])), min_size=0, max_size=60),
)
def test_discounted_is_the_backward_recursion(values):
    expected, carry = [], 0.0
    for value, decay in reversed(values):
        carry = value + decay * carry
        expected.append(carry)
    columns = np.array(values, np.float64).reshape(-1, 2)
    np.testing.assert_allclose(discounted(columns[:, 0], columns[:, 1]), expected[::-1], atol=1e-9)


def whiten(values, variance, eps, added_to="variance"):
    if len(values) < 2:
        return [0.0] * len(values)
    spread = statistics.variance(values) if variance == "sample" else statistics.pvariance(values)
    scale = math.sqrt(spread + eps) if added_to == "variance" else math.sqrt(spread) + eps
    return [(value - statistics.fmean(values)) / scale for value in values]


def kl_of(difference, estimator):
    """Of log policy - log reference."""
    k3 = math.exp(-difference) - 1 + difference
    return {"k1": difference, "k2": difference**2 / 2, "k3": k3}[estimator]


@given(
    rows=samples,
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    variance=st.sampled_from(["sample", "population"]),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    added_to=st.sampled_from(["variance", "deviation"]),
    baseline=st.booleans(),
)
def test_reinforce_plus_plus(rows, gamma, variance, estimator, kl_coef, added_to, baseline):
    inputs = packed(rows)
    generator = np.random.default_rng(0)
    columns = {name: -generator.random(len(inputs.mask)) for name in ("old_logprobs", "ref_logprobs")}
    options = ReinforcePlusPlus(
        gamma=gamma, variance=variance, eps=1e-4, eps_added_to=added_to, kl_coef=kl_coef, kl_estimator=estimator
    )
    function = reinforce_plus_plus_baseline if baseline else reinforce_plus_plus
    got = function(replace(inputs, columns=columns), options)["advantages"]
    returns, token = [], 0
    for reward, group, mask in rows:
        if baseline:
            reward -= statistics.fmean(row[0] for row in siblings(rows, group))
        trained = [token + place for place, m in enumerate(mask) if m]
        token += len(mask)
        per_token = [
            -kl_coef * kl_of(float(columns["old_logprobs"][t] - columns["ref_logprobs"][t]), estimator) for t in trained
        ]
        if per_token:
            per_token[-1] += reward
        returns += [sum(gamma**k * r for k, r in enumerate(per_token[t:])) for t in range(len(per_token))]
    assert not got[~inputs.mask].any()
    np.testing.assert_allclose(got[inputs.mask], whiten(returns, variance, 1e-4, added_to), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("function", [grpo, dr_grpo, rloo, opo, remax])
@given(rows=samples, estimator=st.sampled_from(["k1", "k2", "k3"]), kl_coef=st.sampled_from([0.1, 2.0]))
def test_the_kl_of_a_sample_can_be_taken_off_its_reward(function, rows, estimator, kl_coef):
    """The advantages are those of rewards that are less by kl_coef times the sum over the sample's trained tokens."""
    options = GRPOAdvantage if function is grpo else InReward
    inputs = packed(rows, baseline=np.arange(len(rows)) % 2 == 0)
    generator = np.random.default_rng(0)
    columns = {name: -generator.random(len(inputs.mask)) for name in ("old_logprobs", "ref_logprobs")}
    lowered, token = [], 0
    for reward, group, mask in rows:
        trained = [token + place for place, m in enumerate(mask) if m]
        token += len(mask)
        kl = sum(kl_of(float(columns["old_logprobs"][t] - columns["ref_logprobs"][t]), estimator) for t in trained)
        lowered.append((reward - kl_coef * kl, group, mask))
    expected = function(packed(lowered, baseline=inputs.baseline), options())["advantages"]
    got = function(replace(inputs, columns=columns), options(kl_coef=kl_coef, kl_estimator=estimator))["advantages"]
    np.testing.assert_allclose(got, expected, atol=1e-8, rtol=1e-8)


parts = st.one_of(rewards, st.just(math.nan))


@given(
    rows=st.lists(st.tuples(st.just(0.0), st.integers(0, 2), masks, parts, parts), min_size=1, max_size=10),
    whiten_over=st.sampled_from(["tokens", "samples", "none"]),
)
def test_gdpo_normalises_each_reward_by_itself(rows, whiten_over):
    columns = {"accuracy": 3, "format": 4}
    inputs = packed(
        rows,
        reward_parts={name: np.array([row[place] for row in rows]) for name, place in columns.items()},
        reward_weights={"accuracy": 1.0, "format": 0.5},
    )
    per_sample = [0.0] * len(rows)
    for weight, place in ((1.0, 3), (0.5, 4)):
        for number, row in enumerate(rows):
            known = [other[place] for other in siblings(rows, row[1]) if not math.isnan(other[place])]
            if not math.isnan(row[place]):
                normalised = (row[place] - statistics.fmean(known)) / (deviation(known, "sample") + 1e-6)
                per_sample[number] += weight * normalised
    if whiten_over == "samples":
        per_sample = whiten(per_sample, "sample", 1e-8)
    got = gdpo(inputs, GDPO(whiten=whiten_over))["advantages"]
    trained = [value for value, row in zip(per_sample, rows, strict=True) for m in row[2] if m]
    expected = whiten(trained, "sample", 1e-8) if whiten_over == "tokens" else trained
    assert not got[~inputs.mask].any()
    np.testing.assert_allclose(got[inputs.mask], expected, atol=1e-8, rtol=1e-8)


def test_a_batch_of_nothing_but_masked_tokens_gives_zeros():
    rows = [(1.0, 0, [False, False]), (2.0, 0, [False])]
    baseline = np.array([False, True])
    functions: list[Any] = [
        (grpo, GRPOAdvantage()),
        (opo, InReward()),
        (remax, InReward()),
        (reinforce_plus_plus, ReinforcePlusPlus()),
        (gdpo, GDPO()),
    ]
    for function, options in functions:
        assert not function(packed(rows, baseline=baseline), options)["advantages"].any()


@pytest.mark.parametrize("function", [dr_grpo, rloo])
def test_shifting_all_rewards_of_a_group_changes_nothing(function):
    rows = [(1.0, 0, [False, True]), (3.0, 0, [False, True]), (2.0, 1, [False, True, True]), (5.0, 1, [False, True])]
    shifted = [(row[0] + 10 * row[1], *row[1:]) for row in rows]
    got, moved = function(packed(rows), InReward())["advantages"], function(packed(shifted), InReward())["advantages"]
    np.testing.assert_allclose(got, moved, atol=1e-12)
