"""The family: Qwen3's mixture of experts, with two modules of its own.

Gated attention (arXiv 2505.06708): with x the normalised input of a layer, what the heads give is multiplied by
sigmoid(W_gate x), element by element, before the output projection. Layers may go without: `ungated_layers`.

A router by directions (after arXiv 2204.09179): the logit of expert e is s_e sqrt(H) cos(x, w_e), with a learnt scale
s_e. So no expert is preferred because its row of the router is long.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_core import families
from miles_core.testing import Example
from miles_qwen.family import QWEN3_MOE, Qwen3Moe, is_sparse

ARCHITECTURE, MODEL_TYPE = "AcmeGatedMoeForCausalLM", "acme_gated_moe"
DEFAULTS: Mapping[str, Any] = {**QWEN3_MOE, "norm_topk_prob": True, "ungated_layers": []}
"""What config.json says if nobody says otherwise."""


class GatedMoe:
    """`miles_core.roles.ModelFamily` of `AcmeGatedMoeForCausalLM`."""

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A complete config.json; `ValueError` for unknown or impossible fields."""
        full = families.complete(DEFAULTS, config)
        own = {"ungated_layers": full.pop("ungated_layers")}
        return {**Qwen3Moe().fresh(full), **own, "architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Number of parameters: those of Qwen3, the gates, and a scale an expert."""
        full = {**DEFAULTS, **config}
        gate: int = full["hidden_size"] * full["num_attention_heads"] * families.head_size(full)
        sparse = sum(is_sparse(full, layer) for layer in range(full["num_hidden_layers"]))
        scales: int = sparse * full.get("num_local_experts", full["num_experts"])
        return Qwen3Moe().parameters(full) + len(gated_layers(full)) * gate + scales


def gated_layers(config: Mapping[str, Any]) -> list[int]:
    """Numbers of the layers with a gate, from 0."""
    return [layer for layer in range(config["num_hidden_layers"]) if layer not in config["ungated_layers"]]


def example(folder: Path) -> Example:
    """A tiny model, for contract tests."""
    return Example(
        config={
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [0],
            "ungated_layers": [1],
            "tie_word_embeddings": False,
        }
    )
