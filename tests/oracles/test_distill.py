"""Distillation against TRL 1.16 and verl 0.9.1, on distributions over a small vocabulary."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from miles_core.roles import LossInputs, Segments
from miles_distill.advantage import reverse_kl
from miles_distill.loss import distill
from miles_distill.options import Distill, ReverseKL

TOKENS, VOCABULARY = 7, 11
BETA = {"forward": 0.0, "jsd": 0.3, "reverse": 1.0}
"""TRL's names of the divergences."""


@pytest.fixture(params=[0.3, 1.0, 4.0], ids=lambda scale: f"scale{scale}")
def logits(request):
    """Of a policy and of a teacher, [TOKENS, VOCABULARY]."""
    generator = torch.Generator().manual_seed(0)
    policy, teacher = request.param * torch.randn(2, TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), teacher


def ours(policy, teacher, options):
    top = teacher.log_softmax(-1).topk(options.top_k)
    table = policy.log_softmax(-1)
    inputs = LossInputs(
        logprobs=table[:, 0],
        segments=Segments(ids=torch.zeros(TOKENS, dtype=torch.long), count=1),
        top_logprobs=table.gather(1, top.indices),
        teacher_top_logprobs=top.values,
    )
    return distill(inputs, options).losses.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("divergence", BETA)
def test_generalised_jensen_shannon_of_gkd(trl_distill, logits, same, divergence, temperature):
    """On the whole vocabulary, where nothing is left for a tail."""
    policy, teacher = logits
    theirs = trl_distill.gkd.generalized_jsd_loss(
        policy[None], teacher[None], beta=BETA[divergence], temperature=temperature, reduction="sum"
    )
    options = Distill(top_k=VOCABULARY, divergence=divergence, beta=0.3)
    same(ours(policy / temperature, teacher / temperature, options), theirs, policy)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_the_teachers_likeliest_tokens(trl_distill, logits, same, tail):
    """TRL takes them for the forward divergence."""
    policy, teacher = logits
    theirs = trl_distill.opd.generalized_jsd_loss(
        policy[None], teacher[None], beta=0.0, reduction="sum", top_k=4, add_tail=tail == "bucket"
    )
    same(ours(policy, teacher, Distill(top_k=4, divergence="forward", tail=tail)), theirs, policy)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("divergence", BETA)
def test_the_same_tokens_for_every_divergence(trl_distill, logits, same, divergence, tail):
    """TRL's own parts, on the tokens that we take: for others than the forward one it takes the policy's."""
    policy, teacher = logits
    top = teacher.topk(4).indices
    parts = [each.log_softmax(-1).gather(1, top) for each in (policy, teacher)]
    there = torch.ones_like(top, dtype=torch.bool)
    if tail == "bucket":
        parts = [trl_distill.add_tail(each, there)[0] for each in parts]
        there = torch.ones_like(parts[0], dtype=torch.bool)
    else:
        parts = [each - each.logsumexp(-1, keepdim=True) for each in parts]
    theirs = trl_distill.divergence(parts[0], parts[1], BETA[divergence], there).sum()
    same(ours(policy, teacher, Distill(top_k=4, divergence=divergence, beta=0.3, tail=tail)), theirs, policy)


def test_the_forward_divergence_without_a_tail(verl_distill, logits, same):
    """verl's, without its bounds."""
    policy, teacher = logits
    top = teacher.log_softmax(-1).topk(4)
    nested = [torch.nested.nested_tensor([each], layout=torch.jagged) for each in (top.values, top.indices)]
    settings = SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False)
    theirs = verl_distill.compute_forward_kl_topk(
        policy[None], nested[0], nested[1], SimpleNamespace(distillation_loss=settings), "thd"
    )["distillation_losses"].sum()
    same(ours(policy, teacher, Distill(top_k=4, divergence="forward", tail="drop")), theirs, policy)


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_the_reverse_divergence_of_sampled_tokens(verl, case, clamp):
    """verl's k1 estimate with its bound (loss_max_clamp), which is minus the advantage of its policy gradient."""
    expected = verl.algos.kl_penalty(case.old, case.reference, "k1")
    if clamp is not None:
        expected = expected.clamp(-clamp, clamp)
    inputs = case.advantage_inputs()
    columns = {"old_logprobs": inputs.columns["old_logprobs"], "teacher_logprobs": inputs.columns["ref_logprobs"]}
    got = reverse_kl(replace(inputs, columns=columns), ReverseKL(clamp=clamp, recompute=True))["advantages"]
    np.testing.assert_allclose(got[inputs.mask], -expected[case.mask].numpy(), atol=1e-8, rtol=1e-8)
