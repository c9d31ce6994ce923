"""The Llama family in Megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_core import megatron
from miles_core.megatron import MegatronModel
from miles_llama.family import DEFAULTS


def llama(config: Mapping[str, Any]) -> MegatronModel:
    """Llama without biases."""
    full = {**DEFAULTS, **config}
    for name in ("attention_bias", "mlp_bias"):
        if full[name]:
            raise ValueError(f"{name} is not known to the trainer; set it to false")
    return MegatronModel(
        transformer=megatron.decoder(full),
        gpt=megatron.gpt(full),
        weights=megatron.weights(full, megatron.ATTENTION, megatron.MLP),
    )
