"""Every loss against a reference that goes through one token or one sequence at a time, and hostile input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from miles_core.roles import Segments
from miles_grpo.kl import kl_penalty
from miles_grpo.loss.cispo import cispo
from miles_grpo.loss.clipped import clipped
from miles_grpo.loss.covariance import clip_cov, kl_cov
from miles_grpo.loss.dppo import dppo
from miles_grpo.loss.geo_mean import geo_mean
from miles_grpo.loss.gspo import gspo, gspo_token
from miles_grpo.loss.reinforce import reinforce
from miles_grpo.loss.sapo import sapo
from miles_grpo.options import CISPO, DPPO, GSPO, SAPO, ClipCov, ClippedLoss, GeoMean, KLCov, Reinforce

# ---- References: one sequence (torch scalars) in, its tokens' losses out -----------------------------------------


def clip(value, low, high):
    return min(max(value, value.new_tensor(low)), value.new_tensor(high))


def clipped_token(ratio, advantage, o):
    return -min(ratio * advantage, clip(ratio, 1 - o.clip_low, 1 + o.clip_high) * advantage)


def ref_clipped(logprobs, old, advantages, o):
    losses = [clipped_token((p - q).exp(), a, o) for p, q, a in zip(logprobs, old, advantages, strict=True)]
    if o.dual_clip is None:
        return losses
    return [min(x, -o.dual_clip * a) if a < 0 else x for x, a in zip(losses, advantages, strict=True)]


def ref_gspo(logprobs, old, advantages, o):
    ratio = (sum(logprobs - old) / len(logprobs)).exp()
    return [clipped_token(ratio, a, o) for a in advantages]


def ref_gspo_token(logprobs, old, advantages, o):
    value = math.exp(sum((logprobs - old).tolist()) / len(logprobs))
    return [clipped_token(value * p.exp() / p.exp().item(), a, o) for p, a in zip(logprobs, advantages, strict=True)]


def ref_cispo(logprobs, old, advantages, o):
    weights = [clip((p - q).exp(), 1 - o.clip_low, 1 + o.clip_high).item() for p, q in zip(logprobs, old, strict=True)]
    return [-w * a * p for w, a, p in zip(weights, advantages, logprobs, strict=True)]


def ref_sapo(logprobs, old, advantages, o):
    taus = [o.tau_positive if a > 0 else o.tau_negative for a in advantages]
    ratios = [(p - q).exp() for p, q in zip(logprobs, old, strict=True)]
    gates = [4 / tau / (1 + (-tau * (ratio - 1)).exp()) for tau, ratio in zip(taus, ratios, strict=True)]
    return [-gate * a for gate, a in zip(gates, advantages, strict=True)]


def ref_geo_mean(logprobs, old, advantages, o):
    terms = []
    for p, q, a in zip(logprobs, old, advantages, strict=True):
        d, bounded = p - q, clip(p - q, -o.clip_low, o.clip_high)
        terms.append(min(d, bounded) if a > 0 else max(d, bounded))
    loss = -sum(advantages) / len(advantages) * (sum(terms) / len(terms)).exp()
    return [loss] * len(terms)


def ref_dppo(logprobs, old, advantages, o):
    losses = []
    for p, q, a in zip(logprobs, old, advantages, strict=True):
        new, was = math.exp(p.item()), math.exp(q.item())
        kl = was * math.log(was / new) + (1 - was) * math.log((1 - was) / (1 - new))
        divergence = abs(new - was) if o.divergence == "tv" else kl
        away = (new > was and divergence > o.bound_high) if a > 0 else (new < was and divergence > o.bound_low)
        losses.append(p * 0 if away else -min(new / was, o.ratio_max) * a * p)
    return losses


def ref_reinforce(logprobs, old, advantages, o):
    return [-a * p for a, p in zip(advantages, logprobs, strict=True)]


CASES: dict[str, Any] = {
    "clipped": (clipped, ref_clipped, ClippedLoss(clip_low=0.1, clip_high=0.28)),
    "dual": (clipped, ref_clipped, ClippedLoss(dual_clip=1.5)),
    "gspo": (gspo, ref_gspo, GSPO(clip_low=0.1, clip_high=0.2)),
    "gspo-token": (gspo_token, ref_gspo_token, GSPO(clip_low=0.1, clip_high=0.2)),
    "cispo": (cispo, ref_cispo, CISPO(clip_high=0.3)),
    "cispo-both": (cispo, ref_cispo, CISPO(clip_low=0.2, clip_high=0.3)),
    "sapo": (sapo, ref_sapo, SAPO(tau_positive=1.3, tau_negative=2.0)),
    "geo-mean": (geo_mean, ref_geo_mean, GeoMean(clip_low=0.2, clip_high=0.3)),
    "dppo-tv": (dppo, ref_dppo, DPPO(bound_low=0.02, bound_high=0.03)),
    "dppo-kl": (dppo, ref_dppo, DPPO(divergence="kl", bound_low=0.002, bound_high=0.01, ratio_max=1.2)),
    "reinforce": (reinforce, ref_reinforce, Reinforce()),
}
WITHIN_BATCH: dict[str, Any] = {
    "clip-cov": (clip_cov, ClipCov(share=0.4, cov_low=0.0)),
    "kl-cov": (kl_cov, KLCov(share=0.4, penalty=0.7)),
}
ALL: dict[str, Any] = {name: (loss, options) for name, (loss, _, options) in CASES.items()} | WITHIN_BATCH


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spread", [0.1, 1.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients_equal_the_reference(loss_inputs, sequences, name, spread, seed):
    loss, reference, options = CASES[name]
    inputs = loss_inputs((3, 1, 6, 2, 4), seed=seed, spread=spread)
    losses = loss(inputs, options).losses
    expected = torch.stack(
        [x for one in sequences(inputs) for x in reference(one.logprobs, one.old_logprobs, one.advantages, options)]
    )
    torch.testing.assert_close(losses, expected, atol=1e-8, rtol=1e-8)
    weights = torch.linspace(0.5, 2.0, len(losses), dtype=torch.float64)
    (got,) = torch.autograd.grad((weights * losses).sum(), inputs.logprobs, retain_graph=True)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), inputs.logprobs)
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)


HELD_CONSTANT = {"gspo-token", "cispo", "cispo-both", "dppo-tv", "dppo-kl"}
"""A part of their ratio has no gradient, so finite differences, which know nothing of that, are no reference."""


@pytest.mark.parametrize("name", sorted(set(ALL) - HELD_CONSTANT))
def test_gradient_is_that_of_finite_differences(loss_inputs, name):
    loss, options = ALL[name]
    inputs = loss_inputs((2, 3), seed=1)
    options = replace(options, kl_coef=0.3, entropy_coef=0.1)

    def of(logprobs, entropy):
        outputs = loss(replace(inputs, logprobs=logprobs, entropy=entropy), options)
        return outputs.losses, outputs.penalties

    assert torch.autograd.gradcheck(of, (inputs.logprobs, inputs.entropy))


@pytest.mark.parametrize("name", sorted(set(ALL) - {"clip-cov", "kl-cov"}))
def test_on_policy_the_gradient_is_that_of_reinforce(loss_inputs, name):
    loss, options = ALL[name]
    inputs = loss_inputs()
    segments = inputs.segments
    of_sequence = segments.spread(segments.mean(inputs.advantages))
    inputs = replace(inputs, old_logprobs=inputs.logprobs.detach(), advantages=of_sequence)
    outputs = loss(inputs, options)
    weights = segments.spread(1 / segments.sum(torch.ones_like(of_sequence)))
    (gradient,) = torch.autograd.grad((weights * outputs.losses).sum(), inputs.logprobs)
    torch.testing.assert_close(gradient, -weights * of_sequence, atol=1e-8, rtol=1e-8)
    assert outputs.metrics["ppo_kl"].abs().max() == 0


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(loss_inputs, sequences, name):
    loss, options = ALL[name]
    inputs = loss_inputs(spread=1.0)
    pieces = torch.cat([loss(one, options).losses for one in sequences(inputs)])
    torch.testing.assert_close(loss(inputs, options).losses, pieces, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_extreme_log_ratios_stay_finite(loss_inputs, name, shift):
    loss, options = ALL[name]
    base = loss_inputs((2, 3))
    old = (base.logprobs.detach() + shift).clamp(max=-1e-3)
    inputs = replace(base, old_logprobs=old, ref_logprobs=old, advantages=torch.tensor([0, 0, -2, 2.0, 0]).double())
    outputs = loss(inputs, replace(options, kl_coef=0.1))
    (gradient,) = torch.autograd.grad((outputs.losses + outputs.penalties).sum(), base.logprobs)
    assert outputs.losses.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_no_tokens_give_no_losses(loss_inputs, name):
    loss, options = ALL[name]
    inputs = replace(loss_inputs(()), segments=Segments(ids=torch.zeros(0, dtype=torch.long), count=0))
    assert loss(inputs, options).losses.shape == (0,)


@pytest.mark.parametrize("name", ALL)
def test_metrics_are_per_token_and_without_gradient(loss_inputs, name):
    loss, options = ALL[name]
    inputs = loss_inputs(spread=1.0)
    metrics = loss(inputs, replace(options, kl_coef=0.1)).metrics
    assert "kl" in metrics
    for values in metrics.values():
        assert values.shape == inputs.logprobs.shape
        assert not values.requires_grad


def test_a_clipped_token_has_no_gradient_and_is_counted_on_its_side(loss_inputs):
    base = loss_inputs((4,))
    old = base.logprobs.detach() + torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    outputs = clipped(replace(base, old_logprobs=old, advantages=advantages), ClippedLoss())
    (gradient,) = torch.autograd.grad(outputs.losses.sum(), base.logprobs)
    assert (gradient == 0).tolist() == [True, True, False, False]
    assert outputs.metrics["clip_low"].tolist() == [1, 0, 0, 0]
    assert outputs.metrics["clip_high"].tolist() == [0, 1, 0, 0]


# ---- Covariance: statistics of all tokens at hand ------------------------------------------------------------------


def covariances(inputs):
    logprobs, advantages = inputs.logprobs.tolist(), inputs.advantages.tolist()
    p, a = sum(logprobs) / len(logprobs), sum(advantages) / len(advantages)
    return [(x - p) * (y - a) for x, y in zip(logprobs, advantages, strict=True)]


def test_kl_cov_penalises_the_tokens_of_largest_covariance(loss_inputs):
    inputs = loss_inputs((4, 6), spread=0.5)
    cov = covariances(inputs)
    largest = set(sorted(range(10), key=cov.__getitem__)[-4:])
    expected = []
    for t, (p, q, a) in enumerate(zip(inputs.logprobs, inputs.old_logprobs, inputs.advantages, strict=True)):
        expected.append(-(p - q).exp() * a + (0.7 * (p - q).abs() if t in largest else 0))
    outputs = kl_cov(inputs, WITHIN_BATCH["kl-cov"][1])
    torch.testing.assert_close(outputs.losses, torch.stack(expected), atol=1e-8, rtol=1e-8)
    assert set(outputs.metrics["kl_cov"].nonzero()[:, 0].tolist()) == largest


def test_clip_cov_drops_only_unclipped_tokens_of_the_right_covariance_and_so_many(loss_inputs):
    inputs = loss_inputs((10, 20), spread=0.5)
    options = ClipCov(share=0.1, cov_low=0.05, cov_high=1.0)
    outputs, plain = clip_cov(inputs, options), clipped(inputs, ClippedLoss())
    dropped = outputs.metrics["clip_cov"] == 1
    assert dropped.sum() == 3
    assert (outputs.losses[dropped] == 0).all()
    torch.testing.assert_close(outputs.losses[~dropped], plain.losses[~dropped], atol=1e-8, rtol=1e-8)
    clipped_tokens = plain.metrics["clip_low"] + plain.metrics["clip_high"]
    for t in dropped.nonzero()[:, 0].tolist():
        assert 0.05 < covariances(inputs)[t] < 1.0
        assert clipped_tokens[t] == 0
    torch.testing.assert_close(clip_cov(inputs, options).losses, outputs.losses, atol=1e-8, rtol=1e-8)


# ---- Penalties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_and_entropy_are_penalties(loss_inputs, estimator):
    inputs = loss_inputs(spread=1.0)
    outputs = reinforce(inputs, Reinforce(kl_coef=0.3, kl_estimator=estimator, entropy_coef=0.2))
    expected = []
    for p, r, h in zip(inputs.logprobs, inputs.ref_logprobs, inputs.entropy, strict=True):
        d = p - r
        kl = {"k1": d, "k2": d * d / 2, "k3": (r - p).exp() - 1 - (r - p), "abs": abs(d)}[estimator]
        expected.append(0.3 * kl - 0.2 * h)
    torch.testing.assert_close(outputs.penalties, torch.stack(expected), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(outputs.losses, -inputs.advantages * inputs.logprobs, atol=1e-8, rtol=1e-8)


def test_without_coefficients_there_are_no_penalties(loss_inputs):
    inputs = replace(loss_inputs(), ref_logprobs=None, entropy=None)
    assert clipped(inputs, ClippedLoss()).penalties is None


def distributions():
    """Logits of a policy, and log-probabilities of an old policy and a reference, over six tokens."""
    generator = torch.Generator().manual_seed(0)
    logits, old, reference = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), old.log_softmax(0), reference.log_softmax(0)


def expected_gradient(logits, old, reference, **how):
    """The expectation of the penalty's gradient over tokens drawn from `old`, and that of its value."""
    policy = logits.log_softmax(0)
    penalty = kl_penalty(policy, reference, old, clamp=None, **how)
    mean = (old.exp() * penalty).sum()
    return torch.autograd.grad(mean, logits)[0], mean.detach()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_on_policy_k1_and_k3_are_unbiased(estimator):
    logits, _, reference = distributions()
    policy = logits.log_softmax(0).detach()
    _, value = expected_gradient(logits, policy, reference, estimator=estimator, gradient="direct")
    torch.testing.assert_close(value, (policy.exp() * (policy - reference)).sum(), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("estimator", "gradient"), [("k2", "direct"), ("k1", "k2"), ("k3", "k2"), ("k1", "weighted"), ("k3", "weighted")]
)
def test_on_policy_these_gradients_are_those_of_the_true_kl(estimator, gradient):
    logits, _, reference = distributions()
    policy = logits.log_softmax(0)
    (true,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    got, _ = expected_gradient(logits, policy.detach(), reference, estimator=estimator, gradient=gradient)
    torch.testing.assert_close(got, true, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("estimator", "gradient"), [("k3", "k2-weighted"), ("k1", "weighted"), ("k3", "weighted")])
def test_off_policy_these_gradients_are_those_of_the_true_kl(estimator, gradient):
    logits, old, reference = distributions()
    policy = logits.log_softmax(0)
    assert (policy - old).exp().max() < 10
    (true,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    got, _ = expected_gradient(logits, old, reference, estimator=estimator, gradient=gradient)
    torch.testing.assert_close(got, true, atol=1e-8, rtol=1e-8)


def test_the_direct_gradient_of_k1_is_zero_and_of_k3_that_of_the_reverse():
    logits, _, reference = distributions()
    policy = logits.log_softmax(0)
    nothing, _ = expected_gradient(logits, policy.detach(), reference, estimator="k1", gradient="direct")
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), atol=1e-8, rtol=1e-8)
    (reverse,) = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits, retain_graph=True)
    got, _ = expected_gradient(logits, policy.detach(), reference, estimator="k3", gradient="direct")
    torch.testing.assert_close(got, reverse, atol=1e-8, rtol=1e-8)


def test_the_clamp_bounds_the_estimate_and_stops_its_gradient():
    logprobs = torch.tensor([-12.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -1.5], dtype=torch.float64)
    penalty = kl_penalty(logprobs, reference, None, "k3", "direct", 10.0)
    assert penalty[0].item() == 10.0
    (gradient,) = torch.autograd.grad(penalty.sum(), logprobs)
    assert gradient[0] == 0
    assert gradient[1] != 0
