"""The Llama family against transformers' own configuration and model."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_core.hooks import DeclarationHooks
from miles_llama import miles_models
from miles_llama.family import Llama

SMALL = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(1, 40),
        "hidden_size": st.sampled_from([8, 16]),
        "intermediate_size": st.integers(1, 20),
        "num_hidden_layers": st.integers(1, 3),
        "num_attention_heads": st.just(4),
        "num_key_value_heads": st.sampled_from([None, 1, 2, 4]),
        "head_dim": st.sampled_from([None, 2, 6]),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "pad_token_id": st.none(),
    }
)


@settings(max_examples=25, deadline=None)
@given(SMALL)
def test_the_number_of_parameters_is_that_of_the_transformers_model(config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fresh = Llama().fresh(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fresh))  # type: ignore[no-untyped-call]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert Llama().parameters(fresh) == sum(parameter.numel() for parameter in model.parameters())
    assert Llama().parameters(model.config.to_dict()) == Llama().parameters(fresh)


def test_defaults_are_those_of_transformers() -> None:
    from transformers import AutoConfig, LlamaConfig

    fresh = AutoConfig.for_model(**Llama().fresh({})).to_dict()
    assert fresh == {**LlamaConfig().to_dict(), "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"hidden_sizes": 8}, "unknown field 'hidden_sizes'. Did you mean 'hidden_size'"),
        ({"hidden_size": "8"}, "hidden_size must be a int, got '8'"),
        ({"attention_bias": 1}, "attention_bias must be a bool, got 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads \(5\) must divide num_attention_heads \(32\)"),
        ({"hidden_size": 100}, r"num_attention_heads \(32\) must divide hidden_size \(100\)"),
        ({"head_dim": 5}, r"attention head \(5\) must be even"),
    ],
)
def test_impossible_configurations_are_refused(config: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Llama().fresh(config)


def test_it_is_declared_under_its_architecture() -> None:
    (spec,) = miles_models()
    assert (spec.name, spec.architectures) == ("llama", ("LlamaForCausalLM",))
    assert hasattr(DeclarationHooks, miles_models.__name__)


def test_neither_plugin_nor_family_imports_torch() -> None:
    script = (
        "import sys, miles_llama, miles_llama.family; assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
