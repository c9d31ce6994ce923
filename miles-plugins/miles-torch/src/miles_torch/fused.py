"""A lean forward on a CPU for the common decoder family: Llama, Qwen2, Qwen3 and whatever is built the same way.

A small model's step spends much of its time on starting operations and on fetching weights, so this forward does the
same arithmetic in fewer operations and on weights in the layout that oneDNN reads fastest: one matrix for queries, keys
and values, one for gate and up, rotary tables looked up instead of computed. With oneDNN (seen on AVX2 and AVX-512) a
row's numbers do not depend on what the other rows are or how many.

A model is chosen by its structure (`fits`). The caller still compares both forwards on random weights, since modules of
the same shape may compute something else: Granite scales its residuals.

Shapes: T tokens, of packed sequences or one for each row; H hidden; Hq, Hk heads of queries and keys; D head width;
I intermediate; V vocabulary; N places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from miles_torch.attention import Decode, Prefill, Terms, attend

_REQUIRED = frozenset(
    {
        "input_layernorm.weight", "post_attention_layernorm.weight",
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    }
)  # fmt: skip
_HEAD_NORMS = frozenset({"self_attn.q_norm.weight", "self_attn.k_norm.weight"})
_BIASES = frozenset({"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"})
_TOP = frozenset({"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"})
_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose angles depend on a token's place alone, not on how long the longest sequence is."""


def fits(module: Any) -> bool:
    """Whether a causal language model is built like Llama, Qwen2 or Qwen3: these modules with these parameters only."""
    names = {name for name in module.state_dict() if not name.startswith("model.layers.")}
    rotary = getattr(getattr(module, "model", None), "rotary_emb", None)
    rope = getattr(rotary, "rope_type", None)  # a dictionary in models with several rotary embeddings
    if names != _TOP or not isinstance(rope, str) or rope not in _STATIC_ROPE:
        return False
    norms = [part for name, part in module.named_modules() if name.endswith("norm")]
    if {getattr(norm, "variance_epsilon", None) for norm in norms} != {getattr(module.config, "rms_norm_eps", 0)}:
        return False
    return getattr(module.config, "sliding_window", None) is None and all(
        _layer_fits(layer) for layer in module.model.layers
    )


def _layer_fits(layer: Any) -> bool:
    parameters = dict(layer.named_parameters())
    optional = parameters.keys() - _REQUIRED
    linear = all(type(part) is nn.Linear for name, part in layer.named_modules() if name.endswith("_proj"))
    if not linear or not parameters.keys() >= _REQUIRED or list(layer.buffers()):
        return False
    if optional not in (set(), _HEAD_NORMS, _BIASES, _HEAD_NORMS | _BIASES):
        return False
    norms_by_head = optional >= _HEAD_NORMS
    return not norms_by_head or parameters["self_attn.q_norm.weight"].shape == (layer.self_attn.head_dim,)


class Matrix:
    """A linear map with its own copy of the weights, in the layout that its kernel reads fastest.

    parts: linear layers with the same input; their outputs come side by side.
    """

    def __init__(self, *parts: Any) -> None:
        weight = torch.cat([part.weight for part in parts])
        self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        packed = _packs(weight.dtype)
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None) if packed else weight
        self._linear: Callable[[Tensor], Tensor] = self._packed if packed else self._plain

    def __call__(self, x: Tensor) -> Tensor:
        """[T, inputs] -> [T, outputs of all parts]."""
        return self._linear(x)

    def _packed(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, inputs], weight [outputs, inputs] -> [T, outputs], by the fastest kernel, for which it packs the weight."""
    if not _packs(weight.dtype):
        return F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def _packs(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN with packed weights: what `torch.compile` uses for a frozen model."""
    known = torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )
    half = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return known and (dtype == torch.float32 or half)


@dataclass(frozen=True)
class _Layer:
    """Weights of a layer. qkv gives [T, (Hq + 2 Hk) D], gate_up [T, 2 I]; head_norms: [Hq + Hk, D]."""

    norm: Tensor
    qkv: Matrix
    head_norms: Tensor | None
    out: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix

    @classmethod
    def of(cls, layer: Any, query_heads: int, key_heads: int) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        heads = None
        if hasattr(attention, "q_norm"):
            parts = attention.q_norm.weight.expand(query_heads, -1), attention.k_norm.weight.expand(key_heads, -1)
            heads = torch.cat(parts)
        return cls(
            norm=layer.input_layernorm.weight,
            qkv=Matrix(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms=heads,
            out=Matrix(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=Matrix(mlp.gate_proj, mlp.up_proj),
            down=Matrix(mlp.down_proj),
        )


class FusedDecoder:
    """The forward of a model that `fits`. max_tokens: longest sequence.

    Holds copies of the matrices: to be built anew whenever weights have been loaded.
    """

    def __init__(self, module: Any, max_tokens: int) -> None:
        base, attention = module.model, module.model.layers[0].self_attn
        self.width: int = attention.head_dim
        self.query_heads: int = attention.q_proj.out_features // self.width
        self.key_heads: int = attention.k_proj.out_features // self.width
        self.eps = torch.tensor(base.norm.variance_epsilon)
        self.terms = Terms(scale=attention.scaling)
        self.activation = base.layers[0].mlp.act_fn
        self.embedding: Tensor = base.embed_tokens.weight
        self.norm: Tensor = base.norm.weight
        self.layers = [_Layer.of(layer, self.query_heads, self.key_heads) for layer in base.layers]
        self.head = Matrix(module.lm_head)
        cos, sin = base.rotary_emb(self.norm, torch.arange(max_tokens).unsqueeze(0))
        low, high = sin[0].chunk(2, dim=-1)
        self.cos = cos[0].unsqueeze(1)  # [N, 1, D]
        self.sin = torch.cat((-low, high), dim=-1).unsqueeze(1)  # with the sign that rotating a half brings

    def __call__(self, tokens: Tensor, positions: Tensor, step: Prefill | Decode, keep: Tensor | None) -> Tensor:
        """Logits after the tokens `keep` (all if None), [kept, V]. tokens, positions: int64 [T]."""
        hidden = F.embedding(tokens, self.embedding)
        rotary = self.cos[positions], self.sin[positions]
        for index, layer in enumerate(self.layers):
            attended = self._attend(index, layer, self._normed(hidden, layer.norm), rotary, step)
            if keep is not None and layer is self.layers[-1]:  # of the others only the keys and values matter
                hidden, attended = hidden[keep], attended[keep]
            hidden = layer.out(attended).add_(hidden)
            gate, up = layer.gate_up(self._normed(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            hidden = layer.down(self.activation(gate) * up).add_(hidden)
        return self.head(self._normed(hidden, self.norm))

    def _attend(
        self, index: int, layer: _Layer, x: Tensor, rotary: tuple[Tensor, Tensor], step: Prefill | Decode
    ) -> Tensor:
        """[T, H] -> [T, Hq D]."""
        heads = layer.qkv(x).view(len(x), -1, self.width)
        turned, value = heads.tensor_split((self.query_heads + self.key_heads,), dim=1)
        if layer.head_norms is not None:
            turned = self._normed(turned, layer.head_norms)
        cos, sin = rotary
        turned = (turned * cos).addcmul_(turned.roll(self.width // 2, dims=-1), sin)
        query, key = turned.tensor_split((self.query_heads,), dim=1)
        return attend(step, index, query, key, value, self.terms).flatten(1)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension, in fewer operations than `F.rms_norm` takes on a CPU."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).to(x.dtype).mul_(weight)
