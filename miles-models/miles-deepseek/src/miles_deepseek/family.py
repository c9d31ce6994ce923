"""DeepSeek V3 (arXiv 2412.19437): latent attention, and experts of which every token also sees a shared one.

Queries, and keys with values, go through a narrow layer with a norm of its own. A router scores experts by a sigmoid;
a bias that is no part of the score helps to choose them, within the best groups of experts only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_core import families
from miles_core.testing import Example

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_interleave": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_nextn_predict_layers": 0,
}
"""Those of `transformers.DeepseekV3Config`, and the layers that predict further tokens, which it does not know."""


class DeepseekV3:
    """`roles.ModelFamily` of `DeepseekV3ForCausalLM`."""

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A complete config.json; `ValueError` for unknown or impossible fields."""
        full = families.complete(DEFAULTS, config)
        check(full)
        return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **full}

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Number of parameters, all experts included, and without layers that predict further tokens."""
        full = {**DEFAULTS, **config}
        dense = families.gated_mlp_parameters(full["hidden_size"], full["intermediate_size"])
        attention = _attention(full)
        return families.decoder_parameters(
            full,
            [
                attention + (dense if layer < full["first_k_dense_replace"] else _experts(full))
                for layer in range(full["num_hidden_layers"])
            ],
        )


def check(config: Mapping[str, Any]) -> None:
    """Raises `ValueError` for sizes that make no model of this shape."""
    families.check_sizes(
        {**config, "head_dim": config["qk_rope_head_dim"]},
        "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
        "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    )  # fmt: skip
    families.check_groups(config)


def _attention(config: Mapping[str, Any]) -> int:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    narrow = config["q_lora_rank"]
    queries = hidden * query if narrow is None else narrow * (hidden + 1 + query)
    latent = config["kv_lora_rank"]
    keys_values = hidden * (latent + config["qk_rope_head_dim"]) + latent
    keys_values += latent * heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
    total: int = queries + keys_values + heads * config["v_head_dim"] * hidden
    return total


def _experts(config: Mapping[str, Any]) -> int:
    routed: int = config.get("num_local_experts", config["n_routed_experts"])
    return families.mixture_parameters(
        config["hidden_size"], config["moe_intermediate_size"], routed=routed, shared=config["n_shared_experts"]
    )


def example(folder: Path) -> Example:
    """A tiny model, for contract tests."""
    return Example(
        config={
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 1,
            "tie_word_embeddings": False,
        }
    )
