"""Kimi K2 for training frameworks: a DeepSeek V3 to each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_core.megatron import MegatronModel
from miles_deepseek.megatron import deepseek_v3
from miles_kimi.family import DEFAULTS


def megatron(config: Mapping[str, Any]) -> MegatronModel:
    """See `miles_deepseek.megatron.deepseek_v3`."""
    return deepseek_v3({**DEFAULTS, **config})


def transformers(config: Mapping[str, Any]) -> Any:
    """transformers' configuration of the same model."""
    from transformers import DeepseekV3Config

    own = ("model_type", "auto_map", "num_nextn_predict_layers")
    return DeepseekV3Config(**{name: value for name, value in {**DEFAULTS, **config}.items() if name not in own})
