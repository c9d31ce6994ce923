"""The Qwen families in Megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_core import families, megatron
from miles_core.megatron import MegatronModel
from miles_qwen.family import QWEN2, QWEN3, QWEN3_MOE, is_sparse


def qwen2(config: Mapping[str, Any]) -> MegatronModel:
    """Qwen2: a bias on query, key and value."""
    full = {**QWEN2, **config}
    return MegatronModel(
        transformer={**megatron.decoder(full), "add_qkv_bias": True},
        gpt=megatron.gpt(full),
        weights=megatron.weights(full, megatron.ATTENTION, megatron.QKV_BIAS, megatron.MLP),
    )


def qwen3(config: Mapping[str, Any]) -> MegatronModel:
    """Qwen3: each head of query and key is normalised."""
    full = {**QWEN3, **config}
    return MegatronModel(
        transformer=_normed(full),
        gpt=megatron.gpt(full),
        weights=megatron.weights(full, megatron.ATTENTION, megatron.QK_NORM, megatron.MLP),
    )


def qwen3_moe(config: Mapping[str, Any]) -> MegatronModel:
    """Qwen3 with a mixture of experts in some or all layers."""
    full = {**QWEN3_MOE, **config}
    full["head_dim"] = families.head_size(full)
    sparse = [int(is_sparse(full, layer)) for layer in range(full["num_hidden_layers"])]
    if not full["norm_topk_prob"] and full["num_experts_per_tok"] > 1:
        raise ValueError("norm_topk_prob = false is not known to the trainer; Qwen3's own models have true")
    return MegatronModel(
        transformer={
            **_normed(full),
            "num_moe_experts": full.get("num_local_experts", full["num_experts"]),
            "moe_router_topk": full["num_experts_per_tok"],
            "moe_ffn_hidden_size": full["moe_intermediate_size"],
            "moe_layer_freq": sparse,
        },
        defaults={"moe_router_load_balancing_type": "none", "moe_router_dtype": "fp32"},
        gpt=megatron.gpt(full),
        weights=megatron.weights(
            full, megatron.ATTENTION, megatron.QK_NORM, *([megatron.MLP] if 0 in sparse else []), megatron.EXPERTS
        ),
    )


def _normed(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["attention_bias"]:
        raise ValueError("attention_bias is not known to the trainer; set it to false")
    return {**megatron.decoder(config), "qk_layernorm": True}
