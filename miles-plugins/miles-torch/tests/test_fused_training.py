"""The lean training forward and its backward passes by hand, against autograd and transformers' own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_kit import make_model
from torch.autograd import gradcheck
from trainer_kit import make_batch

from miles_torch.fused import multiply
from miles_torch.fused_training import FusedTraining, Gated, Linears, RMSNorm, Rotation
from miles_torch.model import MicroBatch, Policy
from miles_torch.packing import plan

TOLERANCE = 2e-5
"""Relative to the largest gradient of a parameter, in float32: sums of a hundred products in another order."""


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 4)])
def test_the_norms_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(*shape[1:])
    torch.testing.assert_close(
        RMSNorm.apply(x, weight, 1e-6), torch.nn.functional.rms_norm(x, shape[-1:], eps=1e-6) * weight
    )
    assert gradcheck(lambda *given: RMSNorm.apply(*given, 1e-6), (x, weight))


def test_a_rotation_is_that_of_complex_numbers_and_its_gradient_that_of_finite_differences() -> None:
    x, angle = random(3, 2, 8), torch.rand(3, 1, 4, dtype=torch.float64)
    cos, sin = angle.cos().repeat(1, 1, 2), angle.sin()
    signed = torch.cat((-sin, sin), dim=-1)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(Rotation.apply(x, cos, signed), torch.cat((turned.real, turned.imag), dim=-1))
    assert gradcheck(lambda given: Rotation.apply(given, cos, signed), (x,))


def test_the_gated_units_gradient_is_that_of_finite_differences() -> None:
    x = random(3, 8)
    torch.testing.assert_close(Gated.apply(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])
    assert gradcheck(Gated.apply, (x,))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_linear_layers_side_by_side_have_the_gradients_of_finite_differences(biased: bool, residual: bool) -> None:
    x, weights = random(3, 4), [random(2, 4), random(5, 4)]
    biases: list[torch.Tensor | None] = [random(2), random(5)] if biased else [None, None]
    added = random(3, 7) if residual else None
    expected = torch.cat(
        [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], dim=1
    )
    torch.testing.assert_close(
        Linears.apply(x, added, *weights, *biases), expected if added is None else expected + added
    )
    given: list[Any] = [x, added, *weights, *biases]
    assert gradcheck(Linears.apply, given)


def test_a_packed_product_is_the_product_whatever_the_layout_of_the_weight() -> None:
    x, weight = torch.randn(7, 5), torch.randn(5, 3)
    torch.testing.assert_close(multiply(x, weight.T, None), x @ weight)


def policies(name: str) -> tuple[Policy, Policy]:
    """One with the lean forward, if it takes it, and one with the model's own, of the same weights."""
    lean, own = Policy(make_model(name)), Policy(make_model(name))
    own._fused = None
    return lean, own


def backward(policy: Policy) -> torch.Tensor:
    """Log-probabilities of a random batch, entropies in the objective too."""
    batch = make_batch(temperature=0.8)
    batch = batch.with_columns(tokens=batch["tokens"] % policy.model.config.vocab_size)
    ((packed,),) = plan(batch, range(len(batch)), budget=2**20)
    micro = MicroBatch.build(packed, torch.device("cpu"))
    logprobs, entropy = policy(micro, 0.8, True)
    factors = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0))
    assert entropy is not None
    ((logprobs + 0.3 * entropy) * factors).sum().backward()
    found: torch.Tensor = logprobs.detach()
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_numbers_and_gradients_equal_those_of_the_models_own_forward(name: str) -> None:
    lean, own = policies(name)
    assert lean._fused is not None
    torch.testing.assert_close(backward(lean), backward(own), atol=1e-5, rtol=1e-5)
    for (parameter, left), right in zip(lean.named_parameters(), own.parameters(), strict=True):
        assert left.grad is not None, parameter
        assert right.grad is not None, parameter
        assert (left.grad - right.grad).abs().max() <= TOLERANCE * right.grad.abs().max(), parameter


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_in_bfloat16_it_is_as_near_to_float32_as_a_model_in_bfloat16(name: str) -> None:
    lean, exact = policies(name)
    touched, half = policies(name)
    lean.compute_in(torch.bfloat16)
    touched.compute_in(torch.bfloat16)
    touched.model.model.norm.register_forward_hook(lambda *_: None)
    assert lean.lean
    assert not touched.lean
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    sides = exact, half, lean, touched
    truth, plain, found, cast = [backward(side) for side in sides]
    assert torch.equal(cast, plain)
    assert (found - truth).norm() <= 1.5 * (plain - truth).norm()
    truth, plain, found, cast = [
        torch.cat([parameter.grad.flatten().float() for parameter in side.parameters() if parameter.grad is not None])
        for side in sides
    ]
    assert {parameter.grad.dtype for parameter in lean.parameters() if parameter.grad is not None} == {torch.float32}
    torch.testing.assert_close(cast, plain, atol=0, rtol=2**-7)  # a tied embedding's two gradients are added in float32
    assert (found - truth).norm() <= 1.5 * (plain - truth).norm()
    assert (plain - truth).norm() > 0


def test_a_model_of_the_same_shape_with_other_arithmetic_runs_its_own_forward() -> None:
    assert FusedTraining.of(make_model("granite")) is not None
    assert Policy(make_model("granite"))._fused is None


@pytest.mark.parametrize("change", ["hook", "replacement", "override", "half"])
def test_who_changes_the_model_or_listens_to_it_gets_its_own_forward(change: str) -> None:
    lean, own = policies("llama")
    layer = lean.model.model.layers[0]
    called = []
    if change == "hook":
        layer.mlp.register_forward_hook(lambda *_: called.append(change))
    elif change == "replacement":
        layer.mlp = torch.nn.Identity()
        own.model.model.layers[0].mlp = torch.nn.Identity()
    elif change == "override":
        forward = layer.mlp.forward

        def counted(x: torch.Tensor) -> torch.Tensor:
            called.append(change)
            found: torch.Tensor = forward(x)
            return found

        layer.mlp.forward = counted
    else:
        lean.model.double()
        own.model.double()
    assert lean._fused is not None
    assert not lean._fused.untouched()
    torch.testing.assert_close(backward(lean), backward(own), atol=1e-5, rtol=1e-5)
    assert called == ([change] if change in ("hook", "override") else [])
