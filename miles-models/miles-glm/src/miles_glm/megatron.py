"""GLM-4.5 in Megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_core import megatron
from miles_core.megatron import MegatronModel
from miles_glm.family import DEFAULTS


def glm4_moe(config: Mapping[str, Any]) -> MegatronModel:
    """Grouped-query attention that rotates half of each head, and routed experts."""
    full = {**DEFAULTS, **config}
    routing = megatron.routing(full)
    attention = (
        *megatron.ATTENTION,
        *(megatron.QKV_BIAS if full["attention_bias"] else ()),
        *(megatron.QK_NORM if full["use_qk_norm"] else ()),
    )
    experts = (*megatron.EXPERTS, *megatron.SHARED_EXPERTS, *megatron.EXPERT_BIAS)
    return MegatronModel(
        transformer={
            **megatron.decoder(full),
            **routing,
            "add_qkv_bias": full["attention_bias"],
            "qk_layernorm": full["use_qk_norm"],
        },
        defaults=megatron.ROUTING,
        gpt=megatron.gpt(full),
        weights=megatron.weights(
            full,
            attention,
            megatron.MLP if 0 in routing["moe_layer_freq"] else (),
            experts if 1 in routing["moe_layer_freq"] else (),
        ),
        predictions=megatron.predictions(full, attention, experts),
        ignored=megatron.prediction_tensors(full),
    )
