"""The Qwen families against transformers' own configurations and models."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_qwen import miles_models
from miles_qwen.family import Qwen2, Qwen3, Qwen3Moe

SMALL: dict[str, st.SearchStrategy[Any]] = {
    "vocab_size": st.integers(1, 40),
    "hidden_size": st.sampled_from([8, 16]),
    "intermediate_size": st.integers(1, 20),
    "num_hidden_layers": st.integers(1, 4),
    "num_attention_heads": st.just(4),
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "tie_word_embeddings": st.booleans(),
}
QWEN3 = {**SMALL, "head_dim": st.sampled_from([2, 6]), "attention_bias": st.booleans()}
QWEN3_MOE = {
    **QWEN3,
    "head_dim": st.sampled_from([None, 2, 6]),
    "moe_intermediate_size": st.integers(1, 9),
    "num_experts": st.integers(2, 5),
    "num_experts_per_tok": st.integers(1, 2),
    "decoder_sparse_step": st.integers(1, 3),
    "mlp_only_layers": st.lists(st.integers(0, 3), unique=True, max_size=2),
}
CONFIGS = st.one_of(
    st.tuples(st.just(Qwen2()), st.fixed_dictionaries(SMALL)),
    st.tuples(st.just(Qwen3()), st.fixed_dictionaries(QWEN3)),
    st.tuples(st.just(Qwen3Moe()), st.fixed_dictionaries(QWEN3_MOE)),
)


@settings(max_examples=60, deadline=None)
@given(CONFIGS)
def test_the_number_of_parameters_is_that_of_the_transformers_model(case: tuple[Any, dict[str, Any]]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, config = case
    fresh = family.fresh(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fresh))  # type: ignore[no-untyped-call]
    assert type(model).__name__ == f"{type(family).__name__}ForCausalLM"
    assert family.parameters(fresh) == sum(parameter.numel() for parameter in model.parameters())
    assert family.parameters(model.config.to_dict()) == family.parameters(fresh)


@pytest.mark.parametrize("family", [Qwen2(), Qwen3(), Qwen3Moe()])
def test_defaults_are_those_of_transformers(family: Any) -> None:
    import transformers

    name = type(family).__name__
    reference = getattr(transformers, f"{name}Config")().to_dict()
    fresh = transformers.AutoConfig.for_model(**family.fresh({})).to_dict()
    if name == "Qwen3Moe":  # its config leaves to the model what the others say
        assert fresh.pop("head_dim") == reference["hidden_size"] // reference["num_attention_heads"]
    assert fresh == {**reference, "architectures": [f"{name}ForCausalLM"]}


@pytest.mark.parametrize(
    ("family", "config", "error"),
    [
        (Qwen3(), {"num_head": 4}, "unknown field 'num_head'"),
        (Qwen2(), {"attention_bias": True}, "unknown field 'attention_bias'"),
        (Qwen3(), {"num_attention_heads": 4}, r"num_key_value_heads \(32\) must divide num_attention_heads \(4\)"),
        (Qwen3(), {"rms_norm_eps": "small"}, "rms_norm_eps must be a float, got 'small'"),
        (Qwen3Moe(), {"num_experts": 4}, r"num_experts_per_tok \(8\) exceeds num_experts \(4\)"),
        (Qwen3Moe(), {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, got 0"),
    ],
)
def test_impossible_configurations_are_refused(family: Any, config: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        family.fresh(config)


def test_each_family_is_declared_under_its_architecture() -> None:
    assert {spec.name: spec.architectures for spec in miles_models()} == {
        "qwen2": ("Qwen2ForCausalLM",),
        "qwen3": ("Qwen3ForCausalLM",),
        "qwen3-moe": ("Qwen3MoeForCausalLM",),
    }


def test_neither_plugin_nor_families_import_torch() -> None:
    script = "import sys, miles_qwen, miles_qwen.family; assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", script], check=True)
