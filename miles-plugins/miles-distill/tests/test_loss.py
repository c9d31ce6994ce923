"""The loss `distill` against plain references, torch's own divergence, and finite differences."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_core.roles import LossInputs, Segments
from miles_distill.loss import distill
from miles_distill.options import Distill

torch.set_num_threads(1)

VOCABULARY = 9
WAYS = [
    {"divergence": divergence, "tail": tail, "beta": 0.3}
    for divergence, tail in product(("reverse", "forward", "jsd"), ("bucket", "renormalise", "drop"))
    if tail != "drop" or divergence == "forward"
]
IDS = [f"{way['divergence']}-{way['tail']}" for way in WAYS]


def distributions(seed: int = 0, tokens: int = 6, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy, and log-probabilities of a teacher, float64 [tokens, VOCABULARY]."""
    generator = torch.Generator().manual_seed(seed)
    policy, teacher = scale * torch.randn(2, tokens, VOCABULARY, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), teacher.log_softmax(-1)


def inputs_of(policy_logits: torch.Tensor, teacher: torch.Tensor, top_k: int) -> LossInputs:
    """What a trainer would give the loss: the tokens' own log-probabilities do not matter to it."""
    top = teacher.topk(top_k)
    policy = policy_logits.log_softmax(-1)
    return LossInputs(
        logprobs=policy[:, 0],
        segments=Segments(ids=torch.zeros(len(policy), dtype=torch.long), count=1),
        top_logprobs=policy.gather(1, top.indices),
        teacher_top_logprobs=top.values,
    )


def reference(policy, teacher, options):
    """One token's loss, in plain Python on probabilities of its K tokens."""
    p, q = [x.exp() for x in policy], [x.exp() for x in teacher]
    if options.tail == "bucket":
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
    elif options.tail == "renormalise":
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    if options.divergence == "reverse":
        return sum(x * (x / y).log() for x, y in zip(p, q, strict=True))
    if options.divergence == "forward":
        return sum(y * (y / x).log() for x, y in zip(p, q, strict=True))
    b = options.beta
    m = [b * y + (1 - b) * x for x, y in zip(p, q, strict=True)]
    return sum(b * y * (y / z).log() + (1 - b) * x * (x / z).log() for x, y, z in zip(p, q, m, strict=True))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize(("seed", "top_k", "scale"), [(0, 3, 1.0), (1, 2, 3.0), (2, 8, 0.3)])
def test_values_and_gradients_equal_the_reference(way, seed, top_k, scale):
    options = Distill(top_k=top_k, **way)
    logits, teacher = distributions(seed, scale=scale)
    inputs = inputs_of(logits, teacher, top_k)
    losses = distill(inputs, options).losses
    expected = torch.stack(
        [reference(p, q, options) for p, q in zip(inputs.top_logprobs, inputs.teacher_top_logprobs, strict=True)]
    )
    torch.testing.assert_close(losses, expected, atol=1e-8, rtol=1e-8)
    weights = torch.linspace(0.5, 2.0, len(losses), dtype=torch.float64)
    (got,) = torch.autograd.grad((weights * losses).sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), logits)
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_gradient_is_that_of_finite_differences(way):
    logits, teacher = distributions(tokens=2)
    options = Distill(top_k=4, **way)
    assert torch.autograd.gradcheck(lambda policy: distill(inputs_of(policy, teacher, 4), options).losses, (logits,))


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_with_the_whole_vocabulary_it_is_the_divergence(tail, divergence):
    logits, teacher = distributions()
    policy = logits.log_softmax(-1)
    target, other = (policy, teacher) if divergence == "reverse" else (teacher, policy)
    expected = torch.nn.functional.kl_div(other, target, reduction="none", log_target=True).sum(-1)
    options = Distill(top_k=VOCABULARY, divergence=divergence, tail=tail)
    losses = distill(inputs_of(logits, teacher, VOCABULARY), options).losses
    torch.testing.assert_close(losses, expected, atol=1e-8, rtol=1e-8)
    gradients = [torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for each in (losses, expected)]
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-8)


@given(seed=st.integers(0, 10**6), top_k=st.integers(1, VOCABULARY - 1), scale=st.sampled_from([0.1, 0.5, 1.5]))
def test_the_bucket_never_overstates_a_divergence_and_grows_with_what_is_seen(seed, top_k, scale):
    """Where no tail is as small as its bound."""
    logits, teacher = distributions(seed, scale=scale)
    for divergence in ("reverse", "forward", "jsd"):
        less, more, whole = (
            distill(inputs_of(logits, teacher, k), Distill(top_k=k, divergence=divergence)).losses
            for k in (top_k, top_k + 1, VOCABULARY)
        )
        assert (less >= -1e-9).all()
        assert (less <= more + 1e-9).all()
        assert (more <= whole + 1e-9).all()


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_policy_that_is_the_teacher_has_nothing_to_learn(way):
    _, teacher = distributions()
    logits = teacher.clone().requires_grad_()
    losses = distill(inputs_of(logits, teacher, 4), Distill(top_k=4, **way)).losses
    torch.testing.assert_close(losses, torch.zeros_like(losses))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    if way["tail"] == "drop":  # a constant is missing there, and it pulls probability into the top tokens
        assert gradient.abs().max() > 1e-3
    else:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_certain_and_distant_distributions_stay_finite(way):
    """In float32: a teacher that is certain, a policy that is certain of something else."""
    teacher = torch.tensor([[200.0, 0.0, -50.0, -200.0], [0.0, 0.0, 0.0, 0.0]]).log_softmax(-1)
    logits = torch.tensor([[-200.0, 0.0, 200.0, 100.0], [0.0, 300.0, -300.0, 0.0]], requires_grad=True)
    losses = distill(inputs_of(logits, teacher, 2), Distill(top_k=2, **way)).losses
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


def test_the_masses_are_measured():
    logits, teacher = distributions()
    metrics = distill(inputs_of(logits, teacher, 3), Distill(top_k=3)).metrics
    top = teacher.topk(3)
    torch.testing.assert_close(metrics["teacher_mass"], top.values.exp().sum(-1))
    torch.testing.assert_close(metrics["policy_mass"], logits.softmax(-1).gather(1, top.indices).sum(-1).detach())
    assert not metrics["policy_mass"].requires_grad


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_table_of_logits_becomes_the_teacher(way):
    """Each way leads to the teacher, on the tokens that it compares, by gradient descent."""
    logits, teacher = distributions(scale=2.0)
    options = Distill(top_k=VOCABULARY - 1, **way)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        distill(inputs_of(logits, teacher, options.top_k), options).losses.mean().backward()
        optimizer.step()
    inputs = inputs_of(logits, teacher, options.top_k)
    apart = (inputs.top_logprobs.softmax(-1) - inputs.teacher_top_logprobs.softmax(-1)).abs().max()
    assert apart < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"beta": 1.0}, 'its ends are "forward" and "reverse"'),
        ({"tail": "drop"}, 'goes with divergence = "forward" alone'),
        ({"tail": "renormalise", "top_k": 1}, "leaves nothing to compare"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Distill(**options)


def test_a_bound_on_the_tail_is_that_of_trl():
    """Where the top tokens have all of the probability, the bucket keeps 1e-7 of it."""
    certain = torch.tensor([[0.0, -800.0]], dtype=torch.float64)
    half = torch.tensor([[math.log(0.25), math.log(0.25)]], dtype=torch.float64)
    inputs = LossInputs(
        logprobs=half[:, 0],
        segments=Segments(ids=torch.zeros(1, dtype=torch.long), count=1),
        top_logprobs=half,
        teacher_top_logprobs=certain,
    )
    loss = distill(inputs, Distill(top_k=2, divergence="forward")).losses
    tail = -math.expm1(-1e-7)
    assert loss.item() == pytest.approx(math.log(4) + tail * math.log(tail / 0.5), abs=1e-9)
