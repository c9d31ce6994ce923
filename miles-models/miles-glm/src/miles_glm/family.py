"""GLM-4.5 (arXiv 2508.06471) and its successors: grouped-query attention and DeepSeek V3's mixture of experts.

Half of each head's width is rotated. Query, key and value have a bias; the large model normalises each head of query
and key, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_core import families
from miles_core.testing import Example

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "use_qk_norm": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "num_nextn_predict_layers": 0,
}
"""Those of `transformers.Glm4MoeConfig`, with the head size that all released models have, and the layers that predict
further tokens, which it does not know."""


class Glm4Moe:
    """`roles.ModelFamily` of `Glm4MoeForCausalLM`."""

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A complete config.json; `ValueError` for unknown or impossible fields."""
        full = families.complete(DEFAULTS, config)
        families.check_sizes(
            full, "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"
        )
        families.check_groups(full)
        return {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", **full}

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Number of parameters, all experts included, and without layers that predict further tokens."""
        full = {**DEFAULTS, **config}
        attention = families.attention_parameters(
            full, qkv_bias=full["attention_bias"], out_bias=False, qk_norm=full["use_qk_norm"]
        )
        dense = families.gated_mlp_parameters(full["hidden_size"], full["intermediate_size"])
        return families.decoder_parameters(
            full,
            [
                attention + (dense if layer < full["first_k_dense_replace"] else _experts(full))
                for layer in range(full["num_hidden_layers"])
            ],
        )


def _experts(config: Mapping[str, Any]) -> int:
    routed: int = config.get("num_local_experts", config["n_routed_experts"])
    return families.mixture_parameters(
        config["hidden_size"], config["moe_intermediate_size"], routed=routed, shared=config["n_shared_experts"]
    )


def example(folder: Path) -> Example:
    """A tiny model, for contract tests."""
    return Example(
        config={
            "num_hidden_layers": 3,
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "use_qk_norm": True,
            "tie_word_embeddings": False,
        }
    )
