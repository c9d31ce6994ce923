"""Every correction against a reference that goes through one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch

from miles_core.roles import CorrectionInputs
from miles_grpo.correction.mis import mis
from miles_grpo.correction.opsm import opsm
from miles_grpo.correction.tis import tis
from miles_grpo.options import MIS, OPSM, TIS, IcePop


@pytest.fixture
def correction_inputs(loss_inputs):
    def build(lengths=(3, 1, 6, 2, 4), **how) -> CorrectionInputs:
        inputs = loss_inputs(lengths, **how)
        return CorrectionInputs(
            logprobs=inputs.logprobs.detach(),
            old_logprobs=inputs.old_logprobs,
            rollout_logprobs=inputs.rollout_logprobs,
            segments=inputs.segments,
            advantages=inputs.advantages,
        )

    return build


def differences(inputs, policy):
    """log policy - log rollout, as one list a sequence."""
    of_policy = inputs.old_logprobs if policy == "old" else inputs.logprobs
    rows = [(inputs.segments.ids == number) for number in range(inputs.segments.count)]
    return [(of_policy - inputs.rollout_logprobs)[row].tolist() for row in rows]


def bound(ratio, o):
    if o.how == "truncate":
        return min(ratio, o.high)
    if o.how == "clip":
        return min(max(ratio, o.low), o.high)
    return ratio if o.low <= ratio <= o.high else 0.0


@pytest.mark.parametrize("policy", ["old", "current"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("how", ["truncate", "clip", "mask"])
def test_tis(correction_inputs, policy, level, how):
    inputs = correction_inputs(spread=1.0)
    options = TIS(level=level, how=how, low=0.0 if how == "truncate" else 0.8, high=1.2, policy=policy)
    expected = []
    for d in differences(inputs, policy):
        of = {"token": d, "sequence": [sum(d)] * len(d), "geometric": [sum(d) / len(d)] * len(d)}[level]
        expected += [bound(math.exp(x), options) for x in of]
    outputs = tis(inputs, options)
    torch.testing.assert_close(outputs.weights.tolist(), expected, atol=1e-10, rtol=1e-10)
    beyond = (outputs.metrics["above"] + outputs.metrics["below"]) > 0
    assert beyond.tolist() == [not (options.low <= r <= 1.2) for r in outputs.metrics["ratio"].tolist()]
    if how == "mask":
        assert outputs.metrics["masked"].tolist() == [float(x == 0) for x in expected]
    else:
        assert "masked" not in outputs.metrics


def test_icepop_is_tis_that_masks_tokens(correction_inputs):
    inputs = correction_inputs(spread=3.0)
    got = tis(inputs, IcePop(low=0.5, high=2.0)).weights
    torch.testing.assert_close(got, tis(inputs, TIS(how="mask", low=0.5, high=2.0)).weights)
    assert (got == 0).any()
    assert (got > 0).any()


def statistic(d, o):
    return {"ratio": math.exp(d), "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[o.statistic]


def kept(values, d, o):
    """Whether each token of a sequence is kept."""

    def fits(value):
        return (o.low if o.statistic == "ratio" else -math.inf) <= value <= o.high

    if o.level == "token":
        return [fits(value) for value in values]
    if o.level == "sequence-max":
        return [all(fits(value) for value in values)] * len(values)
    total = math.prod(values) if o.statistic == "ratio" else sum(values)
    mean = math.exp(sum(d) / len(d)) if o.statistic == "ratio" else total / len(values)
    return [fits(total if o.level == "sequence-sum" else mean)] * len(values)


@pytest.mark.parametrize("which", ["ratio", "k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence-sum", "sequence-mean", "sequence-max"])
@pytest.mark.parametrize("veto", [None, 0.6])
@pytest.mark.parametrize("weighted", [True, False])
def test_mis(correction_inputs, which, level, veto, weighted):
    inputs = correction_inputs((1, 3, 1, 2, 6, 1, 2, 4), spread=1.0, seed=3)
    low, high = (0.7, 1.5) if which == "ratio" else (0.0, 0.1)
    if level == "sequence-mean":
        low, high = (0.9, 1.2) if which == "ratio" else (0.0, 0.03)
    options = MIS(statistic=which, level=level, low=low, high=high, veto=veto, weighted=weighted)
    expected = []
    for d in differences(inputs, "old"):
        keep = kept([statistic(x, options) for x in d], d, options)
        if veto is not None and min(math.exp(x) for x in d) < veto:
            keep = [False] * len(d)
        expected += [(math.exp(x) if weighted else 1.0) * k for x, k in zip(d, keep, strict=True)]
    outputs = mis(inputs, options)
    torch.testing.assert_close(outputs.weights.tolist(), expected, atol=1e-10, rtol=1e-10)
    assert outputs.metrics["masked"].tolist() == [float(x == 0) for x in expected]
    assert ("vetoed" in outputs.metrics) == (veto is not None)
    assert 0 < sum(x == 0 for x in expected) < len(expected)


def test_opsm_masks_bad_sequences_that_the_policy_left(correction_inputs):
    inputs = correction_inputs(spread=0.5, seed=1)
    delta = 0.05
    expected, place = [], 0
    for d in differences(inputs, "current"):
        drift = -sum(d) / len(d)
        for _ in d:
            bad = inputs.advantages[place].item() < 0 and drift > delta
            expected.append(0.0 if bad else 1.0)
            place += 1
    assert 0 < expected.count(0.0) < len(expected)
    outputs = opsm(inputs, OPSM(delta=delta))
    assert outputs.weights.tolist() == expected
    assert outputs.metrics["masked"].tolist() == [1 - x for x in expected]


@pytest.mark.parametrize(
    ("correction", "options"), [(tis, TIS()), (tis, IcePop()), (mis, MIS()), (mis, MIS(weighted=False)), (opsm, OPSM())]
)
def test_equal_policies_are_left_alone_and_extreme_ones_stay_finite(correction_inputs, correction, options):
    inputs = correction_inputs()
    equal = CorrectionInputs(
        logprobs=inputs.logprobs,
        old_logprobs=inputs.logprobs,
        rollout_logprobs=inputs.logprobs,
        segments=inputs.segments,
        advantages=inputs.advantages,
    )
    assert (correction(equal, options).weights == 1).all()
    for shift in (1e4, -1e4):
        far = CorrectionInputs(
            logprobs=inputs.logprobs,
            old_logprobs=inputs.logprobs,
            rollout_logprobs=inputs.logprobs + shift,
            segments=inputs.segments,
            advantages=inputs.advantages,
        )
        assert correction(far, options).weights.isfinite().all()
