"""A lean forward and backward over packed samples on a CPU, for the decoder family that `fused.fits` knows.

The arithmetic is that of the model's own modules. Written here it goes over memory fewer times: each of the three
functions below that are not matrix products has its backward pass by hand, linear layers with one input share their
gradient by it, and in the last layer only the tokens that predict something go on after attention.

- RMSNorm: y = n w, n = x s, s = (mean(x^2) + eps)^(-1/2). With g = dy w: dw = sum(dy n), dx = s (g - n mean(g n)).
- Rotation by place: y = x c + h(x) s, where h exchanges the two halves of a head and s carries the sign. As h is its
  own inverse, dx = dy c + h(dy s).
- Gated unit: y = silu(a) b for the two halves a, b of x.

It computes in float32, or in bfloat16 from float32 parameters, whose gradients autograd makes float32 again. What
passes between operations is then bfloat16, the residual stream too, as in a model whose parameters are bfloat16.

It calls no module of the model, so it is not for a model that somebody has hooked into or changed: see `untouched`.

Shapes: N tokens of a packed row; T sources; H hidden; Hq, Hk heads of queries and keys; D head width; I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from miles_torch.attention_packed import Padded, padded_attention
from miles_torch.fused import fits, multiply

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class RMSNorm(torch.autograd.Function):
    """(x [..., H], weight [H], eps) -> [..., H]; or by head: (x [N, heads, D], weight [heads, D], eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        single = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(single, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed, weight = (single * scale).to(x.dtype), weight.to(x.dtype)
        ctx.save_for_backward(normed, scale.to(x.dtype), weight)
        out: Tensor = normed * weight
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        product = grad * normed
        by_weight = product.sum(0)
        mean = product.mul_(weight).mean(-1, keepdim=True)
        inner = torch.mul(grad, weight, out=product)
        return inner.addcmul_(normed, mean, value=-1).mul_(scale), by_weight, None


class Rotation(torch.autograd.Function):
    """(x [N, heads, D], cos [N, 1, D], signed sin [N, 1, D]) -> [N, heads, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grad * sin).roll(grad.shape[-1] // 2, dims=-1).addcmul_(grad, cos), None, None


class Gated(torch.autograd.Function):
    """(x [N, 2 I]) -> silu(first half) * second half, [N, I]. Keeps x alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        by_x = torch.empty_like(x)
        by_gate, by_up = by_x.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=by_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=by_gate)
        return by_x


class Linears(torch.autograd.Function):
    """(x [N, H], residual or None, weights ..., biases or None ...) -> the outputs of linear layers side by side, plus
    the residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> Tensor:
        count = len(parameters) // 2
        weights = [weight for weight in parameters[:count] if weight is not None]
        biases = [bias for bias in parameters[count:] if bias is not None]
        whole = (weights[0] if count == 1 else torch.cat(weights)).to(x.dtype)
        ctx.sizes, ctx.biased, ctx.added = [len(weight) for weight in weights], bool(biases), residual is not None
        ctx.save_for_backward(x, whole)
        out = multiply(x, whole, torch.cat(biases).to(x.dtype) if biases else None)
        return out if residual is None else out.add_(residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, whole = ctx.saved_tensors
        parts = torch.split(grad, ctx.sizes, dim=1)
        by_biases = [part.sum(0) if ctx.biased else None for part in parts]
        by_x = multiply(grad, whole.T, None)
        return by_x, grad if ctx.added else None, *(part.T @ x for part in parts), *by_biases


def _linears(x: Tensor, *layers: Any, residual: Tensor | None = None) -> Tensor:
    out: Tensor = Linears.apply(  # type: ignore[no-untyped-call]
        x, residual, *(layer.weight for layer in layers), *(layer.bias for layer in layers)
    )
    return out


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class FusedTraining:
    """A model that fits, as it was when this was made. model: float32, on the CPU. dtype: what it computes in."""

    def __init__(self, model: Any) -> None:
        self.dtype = torch.float32
        self.body: Any = model.model
        attention = self.body.layers[0].self_attn
        self.width: int = attention.head_dim
        self.heads: int = attention.q_proj.out_features // self.width
        self.key_heads: int = attention.k_proj.out_features // self.width
        self.eps: float = self.body.norm.variance_epsilon
        self._parts = [(module, type(module)) for module in self.body.modules()]

    @classmethod
    def of(cls, model: Any) -> FusedTraining | None:
        """For the models that it is for: float32, with the sigmoid-weighted gate of the family."""
        single = {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        silu = getattr(model.config, "hidden_act", None) == "silu"
        return cls(model) if single and silu and fits(model) else None

    def untouched(self) -> bool:
        """Whether the modules are the same ones, on the CPU, and nobody listens to them."""
        now = [(module, type(module)) for module in self.body.modules()]
        weight = self.body.norm.weight
        if now != self._parts or weight.device.type != "cpu" or weight.dtype not in {torch.float32, self.dtype}:
            return False
        return not any("forward" in vars(module) or any(getattr(module, name) for name in _HOOKS) for module, _ in now)

    def __call__(self, tokens: Tensor, positions: Tensor, layout: Padded, sources: Tensor) -> Tensor:
        """Hidden states after the tokens at `sources`, [T, H]. tokens, positions: int64 [N]."""
        hidden = F.embedding(tokens, self.body.embed_tokens.weight).to(self.dtype)
        cos, sin = self.body.rotary_emb(hidden, positions[None])
        low, high = sin[0].chunk(2, dim=-1)
        rotary = cos[0].unsqueeze(1), torch.cat((-low, high), dim=-1).unsqueeze(1)
        last = self.body.layers[-1]
        for layer in self.body.layers:
            attended = self._attend(layer, _normed(hidden, layer.input_layernorm.weight, self.eps), rotary, layout)
            if layer is last:
                hidden, attended = hidden[sources], attended[sources]
            hidden = _linears(attended, layer.self_attn.o_proj, residual=hidden)
            normed = _normed(hidden, layer.post_attention_layernorm.weight, self.eps)
            gated = Gated.apply(_linears(normed, layer.mlp.gate_proj, layer.mlp.up_proj))  # type: ignore[no-untyped-call]
            hidden = _linears(gated, layer.mlp.down_proj, residual=hidden)
        return _normed(hidden, self.body.norm.weight, self.eps)

    def _attend(self, layer: Any, x: Tensor, rotary: tuple[Tensor, Tensor], layout: Padded) -> Tensor:
        """[N, H] -> [N, Hq D]."""
        attention = layer.self_attn
        heads = _linears(x, attention.q_proj, attention.k_proj, attention.v_proj).view(len(x), -1, self.width)
        turned, value = torch.split(heads, [self.heads + self.key_heads, self.key_heads], dim=1)
        if hasattr(attention, "q_norm"):
            parts = attention.q_norm.weight.expand(self.heads, -1), attention.k_norm.weight.expand(self.key_heads, -1)
            turned = _normed(turned, torch.cat(parts), self.eps)
        turned = Rotation.apply(turned, *rotary)  # type: ignore[no-untyped-call]
        query, key = torch.split(turned, [self.heads, self.key_heads], dim=1)
        return padded_attention(query, key, value, layout, attention.scaling).flatten(1)
