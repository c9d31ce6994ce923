"""The family for training frameworks. Imports nothing heavy: the modules that are named here, a trainer imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from miles_core.megatron import MegatronModel, Weight
from miles_qwen.megatron import qwen3_moe

from acme_gated_moe.family import DEFAULTS, gated_layers

ROUTER = {"mlp.router": "acme_gated_moe.megatron_modules:DirectionRouter"}
GATED = {
    "input_layernorm": "acme_gated_moe.megatron_modules:norm",
    "self_attention": "acme_gated_moe.megatron_modules:GatedAttention",
}
"""Place in a layer of Megatron's model -> what stands there."""

_M, _H = "decoder.layers.{layer}.", "model.layers.{layer}."
OWN = (
    Weight(megatron=f"{_M}input_layernorm.weight", hf=(f"{_H}input_layernorm.weight",)),
    Weight(megatron=f"{_M}self_attention.linear_gate.weight", hf=(f"{_H}self_attn.gate_proj.weight",)),
    Weight(megatron=f"{_M}mlp.router.scale", hf=(f"{_H}mlp.gate.scale",)),
)
"""Where the tensors go that Qwen3's mixture has not, or not there: a gated layer has its norm apart."""


def megatron(config: Mapping[str, Any]) -> MegatronModel:
    """Qwen3's mixture with our router in all layers, and our attention in those with a gate."""
    full = {**DEFAULTS, **config}
    plain = qwen3_moe(full)
    return replace(
        plain,
        weights=(*plain.weights, *OWN),
        modules=ROUTER,
        layers={layer: GATED for layer in gated_layers(full)},
    )


def transformers(config: Mapping[str, Any]) -> Any:
    """transformers' configuration of it, for the engine and the trainer `torch`: a class of our own."""
    from acme_gated_moe.modeling import AcmeGatedMoeConfig

    return AcmeGatedMoeConfig(**{**DEFAULTS, **config})
