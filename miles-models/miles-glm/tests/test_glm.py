"""The GLM family against transformers' own configuration and model."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from miles_glm import miles_models
from miles_glm.family import Glm4Moe
from miles_glm.megatron import glm4_moe

LARGE = {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "n_routed_experts": 160,
    "first_k_dense_replace": 3,
    "attention_bias": True,
    "use_qk_norm": True,
}
"""What GLM-4.5's config.json has unlike the smaller one's."""


def test_defaults_are_those_of_transformers() -> None:
    from transformers import AutoConfig, Glm4MoeConfig

    fresh = AutoConfig.for_model(**Glm4Moe().fresh({})).to_dict()
    assert (fresh.pop("num_nextn_predict_layers"), fresh.pop("head_dim")) == (0, 128)
    assert fresh == {**Glm4MoeConfig().to_dict(), "architectures": ["Glm4MoeForCausalLM"]}


def test_the_models_have_their_355_and_106_billion_parameters() -> None:
    """Without the layer that predicts a second token, which the published 355 and 106 leave out too or round away."""
    assert abs(Glm4Moe().parameters(LARGE) / 355e9 - 1) < 0.01
    assert abs(Glm4Moe().parameters({"attention_bias": True}) / 106e9 - 1) < 0.01


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"use_qknorm": True}, "unknown field 'use_qknorm'. Did you mean 'use_qk_norm'"),
        ({"n_group": 3}, r"n_group \(3\) must divide n_routed_experts \(128\)"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be at least 1, got 0"),
    ],
)
def test_impossible_configurations_are_refused(config: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Glm4Moe().fresh(config)


def test_what_megatron_cannot_compute_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_topk_prob = false is not known"):
        glm4_moe({"norm_topk_prob": False})


def test_it_is_declared_under_its_architecture() -> None:
    (spec,) = miles_models()
    assert (spec.name, spec.architectures) == ("glm4-moe", ("Glm4MoeForCausalLM",))


def test_neither_plugin_nor_family_imports_torch() -> None:
    script = (
        "import sys, miles_glm, miles_glm.megatron;"
        "assert not {'torch', 'transformers'} & {*sys.modules}, {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
