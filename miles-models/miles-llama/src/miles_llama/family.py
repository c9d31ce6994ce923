"""Llama: decoder with grouped-query attention, rotary embeddings, RMS norm and a gated MLP (arXiv 2302.13971)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_core import families

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}
"""Those of `transformers.LlamaConfig`."""


class Llama:
    """`roles.ModelFamily` of `LlamaForCausalLM`."""

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A complete config.json; `ValueError` for unknown or impossible fields."""
        full = families.complete(DEFAULTS, config)
        families.check_sizes(full)
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **full}

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Number of parameters, tied ones counted once."""
        full = {**DEFAULTS, **config}
        bias = full["attention_bias"]
        layer = families.attention_parameters(
            full, qkv_bias=bias, out_bias=bias, qk_norm=False
        ) + families.gated_mlp_parameters(full["hidden_size"], full["intermediate_size"], bias=full["mlp_bias"])
        return families.decoder_parameters(full, [layer] * full["num_hidden_layers"])
