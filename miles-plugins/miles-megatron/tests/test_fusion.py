"""What is fused where: Transformer Engine's own only with its layers, and never in Megatron's output layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron_kit import config_of
from torch import nn

from miles_megatron import families
from miles_megatron.start import prepare


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_the_layers_in_use_decide_what_is_fused_on_a_gpu(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    prepare()
    from miles_megatron import settings

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    described = families.describe({"architectures": ["Qwen3ForCausalLM"], **config_of("qwen3")})
    found = settings._defaults(described, implementation)
    assert found["transformer_impl"] == implementation
    for name in ("apply_rope_fusion", "gradient_accumulation_fusion"):
        assert found[name] == (implementation == "transformer_engine"), name


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_only_transformer_engines_modules_add_gradients_as_they_compute_them(implementation: str) -> None:
    prepare()
    from miles_megatron import model

    config = SimpleNamespace(gradient_accumulation_fusion=True, transformer_impl=implementation)
    fused: Any = nn.Linear(1, 1)
    plain = nn.Linear(1, 1)
    fused.fuse_wgrad_accumulation = False
    chunk = nn.Sequential(fused, plain)
    with model._fusion(config) as fuse:
        # Megatron's own linear layers, which are built here, refuse it without Apex.
        assert config.gradient_accumulation_fusion == (implementation == "local")
        assert fuse(chunk) is chunk
    assert config.gradient_accumulation_fusion
    assert fused.fuse_wgrad_accumulation == (implementation == "transformer_engine")
    assert not hasattr(plain, "fuse_wgrad_accumulation")
