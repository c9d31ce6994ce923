"""Qwen2 (arXiv 2407.10671), Qwen3 and its mixture of experts (arXiv 2505.09388).

All are decoders with grouped-query attention, rotary embeddings, RMS norm and gated MLPs. Qwen2 has a bias on query,
key and value; Qwen3 normalises each head of query and key instead. In the mixture, a router picks some experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_core import families

_SHARED: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN2: Mapping[str, Any] = {**_SHARED, "max_window_layers": 28, "layer_types": None}
"""Those of `transformers.Qwen2Config`."""
QWEN3: Mapping[str, Any] = {**QWEN2, "head_dim": 128, "attention_bias": False}
"""Those of `transformers.Qwen3Config`."""
QWEN3_MOE: Mapping[str, Any] = {
    **_SHARED,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "head_dim": None,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "mlp_only_layers": [],
}
"""Those of `transformers.Qwen3MoeConfig`."""


class Qwen2:
    """`roles.ModelFamily` of `Qwen2ForCausalLM`."""

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A complete config.json; `ValueError` for unknown or impossible fields."""
        full = families.complete(QWEN2, config)
        families.check_sizes(full)
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **full}

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Number of parameters, tied ones counted once."""
        full = {**QWEN2, **config}
        layer = families.attention_parameters(full, qkv_bias=True, out_bias=False, qk_norm=False) + _mlp(full)
        return families.decoder_parameters(full, [layer] * full["num_hidden_layers"])


class Qwen3:
    """`roles.ModelFamily` of `Qwen3ForCausalLM`."""

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A complete config.json; `ValueError` for unknown or impossible fields."""
        full = families.complete(QWEN3, config)
        families.check_sizes(full)
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **full}

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Number of parameters, tied ones counted once."""
        full = {**QWEN3, **config}
        return families.decoder_parameters(full, [_qwen3_attention(full) + _mlp(full)] * full["num_hidden_layers"])


class Qwen3Moe:
    """`roles.ModelFamily` of `Qwen3MoeForCausalLM`."""

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A complete config.json; `ValueError` for unknown or impossible fields."""
        full = families.complete(QWEN3_MOE, config)
        families.check_sizes(full, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
        if full["num_experts_per_tok"] > full["num_experts"]:
            raise ValueError(
                f"num_experts_per_tok ({full['num_experts_per_tok']}) exceeds num_experts ({full['num_experts']})"
            )
        full["head_dim"] = families.head_size(full)  # transformers takes one that is null at its word
        return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **full}

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Number of parameters, all experts included, tied ones counted once."""
        full = {**QWEN3_MOE, **config}
        attention = _qwen3_attention(full)
        return families.decoder_parameters(
            full,
            [
                attention + (_experts(full) if is_sparse(full, layer) else _mlp(full))
                for layer in range(full["num_hidden_layers"])
            ],
        )


def _qwen3_attention(config: Mapping[str, Any]) -> int:
    bias = config["attention_bias"]
    return families.attention_parameters(config, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _mlp(config: Mapping[str, Any]) -> int:
    return families.gated_mlp_parameters(config["hidden_size"], config["intermediate_size"])


def is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of the mixture has experts, and not one MLP."""
    return layer not in (config["mlp_only_layers"] or ()) and (layer + 1) % config["decoder_sparse_step"] == 0


def _experts(config: Mapping[str, Any]) -> int:
    count: int = config.get("num_local_experts", config["num_experts"])  # what transformers 5 calls it when it saves
    router: int = count * config["hidden_size"]
    expert = families.gated_mlp_parameters(config["hidden_size"], config["moe_intermediate_size"])
    return router + count * expert
