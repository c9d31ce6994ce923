"""DeepSeek V3 in Megatron-core."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from miles_core import megatron
from miles_core.megatron import MegatronModel
from miles_deepseek.family import DEFAULTS


def deepseek_v3(config: Mapping[str, Any]) -> MegatronModel:
    """Latent attention and routed experts. The layer that predicts a second token, which some folders hold beyond the
    last one, is left out, as transformers does."""
    full = {**DEFAULTS, **config}
    if full["attention_bias"]:
        raise ValueError("attention_bias is not known to the trainer; set it to false")
    if not full["norm_topk_prob"]:
        raise ValueError("norm_topk_prob = false is not known to the trainer")
    sparse = [int(layer >= full["first_k_dense_replace"]) for layer in range(full["num_hidden_layers"])]
    gpt = megatron.gpt({**full, "rope_scaling": None, "rope_parameters": None})
    return MegatronModel(
        transformer={**megatron.decoder(full), **_latent(full), **_routing(full), "moe_layer_freq": sparse},
        defaults={
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_router_bias_update_rate": 0.0,  # otherwise the bias that chooses experts would move while training
        },
        gpt=gpt,
        weights=megatron.weights(
            full,
            megatron.LATENT_ATTENTION,
            megatron.LATENT_QUERY if full["q_lora_rank"] is not None else megatron.PLAIN_QUERY,
            megatron.MLP if 0 in sparse else (),
            *((megatron.EXPERTS, megatron.SHARED_EXPERTS, megatron.EXPERT_BIAS) if 1 in sparse else ()),
        ),
        ignored=(rf"model\.layers\.{re.escape(str(full['num_hidden_layers']))}\..*",),
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


def _routing(config: Mapping[str, Any]) -> dict[str, Any]:
    groups, chosen, experts = config["n_group"], config["topk_group"], config["num_experts_per_tok"]
    if groups > 1 and experts // chosen != 2:
        raise ValueError(
            f"num_experts_per_tok ({experts}) must be twice topk_group ({chosen}): a group is rated by its two best "
            "experts, and the trainer takes as many as it chooses from each"
        )
    return {
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": chosen if groups > 1 else None,
        "num_moe_experts": config.get("num_local_experts", config["n_routed_experts"]),
        "moe_router_topk": experts,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"] * config["n_shared_experts"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
    }
