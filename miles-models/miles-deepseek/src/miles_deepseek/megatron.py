"""DeepSeek V3 in Megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_core import megatron
from miles_core.megatron import MegatronModel
from miles_deepseek.family import DEFAULTS


def deepseek_v3(config: Mapping[str, Any]) -> MegatronModel:
    """Latent attention and routed experts."""
    full = {**DEFAULTS, **config}
    if full["attention_bias"]:
        raise ValueError("attention_bias is not known to the trainer; set it to false")
    if full["q_lora_rank"] is None:
        raise ValueError("q_lora_rank = null is not known to the trainer: Megatron would put a norm before the queries")
    routing = megatron.routing(full)
    attention = megatron.LATENT_ATTENTION
    experts = (*megatron.EXPERTS, *megatron.SHARED_EXPERTS, *megatron.EXPERT_BIAS)
    return MegatronModel(
        transformer={**megatron.decoder(full), **_latent(full), **routing},
        defaults=megatron.ROUTING,
        gpt=megatron.gpt({**full, "rope_scaling": None, "rope_parameters": None}),
        weights=megatron.weights(
            full,
            attention,
            megatron.MLP if 0 in routing["moe_layer_freq"] else (),
            experts if 1 in routing["moe_layer_freq"] else (),
        ),
        predictions=megatron.predictions(full, attention, experts),
        ignored=megatron.prediction_tensors(full),
    )


def _latent(config: Mapping[str, Any]) -> dict[str, Any]:
    found = megatron.rope(config)
    fields = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "kv_channels": config["qk_nope_head_dim"],
        "rotary_base": found["rope_theta"],
    }
    if found["rope_type"] == "default":
        return {**fields, "rope_type": "rope"}
    if found["rope_type"] != "yarn":
        raise ValueError(f"rotary embeddings of type {found['rope_type']!r} are not known to the trainer")
    return {
        **fields,
        "rope_type": "yarn",
        "rotary_scaling_factor": found["factor"],
        "original_max_position_embeddings": found["original_max_position_embeddings"],
        "beta_fast": found.get("beta_fast", 32.0),
        "beta_slow": found.get("beta_slow", 1.0),
        "mscale": found.get("mscale", 1.0),
        "mscale_all_dim": found.get("mscale_all_dim", 0.0),
    }
