"""The DeepSeek family against transformers' own configuration and model."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from miles_deepseek import miles_models
from miles_deepseek.family import DeepseekV3
from miles_deepseek.megatron import deepseek_v3


def test_defaults_are_those_of_transformers() -> None:
    from transformers import AutoConfig, DeepseekV3Config

    fresh = AutoConfig.for_model(**DeepseekV3().fresh({})).to_dict()
    assert fresh.pop("num_nextn_predict_layers") == 0
    assert fresh == {**DeepseekV3Config().to_dict(), "architectures": ["DeepseekV3ForCausalLM"]}


def test_the_defaults_are_deepseek_v3_with_its_671_billion_parameters() -> None:
    assert round(DeepseekV3().parameters({}) / 1e9) == 671


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"hidden_sizes": 8}, "unknown field 'hidden_sizes'. Did you mean 'hidden_size'"),
        ({"n_group": 7}, r"n_group \(7\) must divide n_routed_experts \(256\)"),
        ({"topk_group": 9}, r"topk_group \(9\) exceeds n_group \(8\)"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be at least 1, got 0"),
        ({"qk_rope_head_dim": 5}, r"attention head \(5\) must be even"),
    ],
)
def test_impossible_configurations_are_refused(config: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        DeepseekV3().fresh(config)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"topk_group": 8}, r"num_experts_per_tok \(8\) must be twice topk_group \(8\)"),
        ({"norm_topk_prob": False}, "norm_topk_prob = false is not known"),
        ({"attention_bias": True}, "attention_bias is not known"),
        ({"q_lora_rank": None}, "q_lora_rank = null is not known"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary embeddings of type 'linear' are not known"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"weights are quantised \(fp8\): turn them into bfloat16"),
    ],
)
def test_what_megatron_cannot_compute_is_refused(config: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        deepseek_v3(config)


def test_layers_that_predict_further_tokens_are_ignored_until_a_run_asks_for_them() -> None:
    model = deepseek_v3({"num_hidden_layers": 3, "num_nextn_predict_layers": 2})
    assert model.ignored == (r"model\.layers\.3\..*", r"model\.layers\.4\..*")
    assert [layer.copies for layer in model.predictions] == [
        {
            f"model.layers.{number}.embed_tokens.weight": "embedding.word_embeddings.weight",
            f"model.layers.{number}.shared_head.head.weight": "output_layer.weight",
        }
        for number in (3, 4)
    ]


def test_it_is_declared_under_its_architecture() -> None:
    (spec,) = miles_models()
    assert (spec.name, spec.architectures) == ("deepseek-v3", ("DeepseekV3ForCausalLM",))


def test_neither_plugin_nor_family_imports_torch() -> None:
    script = (
        "import sys, miles_deepseek, miles_deepseek.megatron;"
        "assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}, {'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
