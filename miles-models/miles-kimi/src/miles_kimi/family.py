"""Kimi K2 (arXiv 2507.20534): DeepSeek V3 with more experts in one group, fewer heads, and stretched positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_core import families
from miles_deepseek.family import DEFAULTS as DEEPSEEK_V3
from miles_deepseek.family import DeepseekV3, check

DEFAULTS: Mapping[str, Any] = {
    **DEEPSEEK_V3,
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.827,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "bos_token_id": 163584,
    "eos_token_id": 163585,
}
"""Those of Kimi-K2-Instruct's config.json."""


class KimiK2:
    """`roles.ModelFamily` of models whose model type is `kimi_k2`."""

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A complete config.json; `ValueError` for unknown or impossible fields."""
        full = families.complete(DEFAULTS, config)
        check(full)
        return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", **full}

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Number of parameters, all experts included, and without layers that predict further tokens."""
        return DeepseekV3().parameters({**DEFAULTS, **config})
