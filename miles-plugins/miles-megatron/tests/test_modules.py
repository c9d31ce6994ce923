"""A family puts modules of its own into Megatron's model: transformers with weights changed to match is the oracle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_kit import config_of, make_batch, make_model, make_trainer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from miles_core.errors import UserError
from miles_core.megatron import Weight
from miles_core.testing.models import batch_logprobs
from miles_megatron import families
from miles_qwen.megatron import qwen3, qwen3_moe


def gated_attention(*args: Any, **kwargs: Any) -> Any:
    """Attention whose output passes a learned gate, one for each of its features."""
    from miles_megatron.local import Attention

    class Gated(Attention):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self.gate = torch.nn.Parameter(torch.zeros(config.num_attention_heads * config.kv_channels))

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(*args, **kwargs) * self.gate.sigmoid()

    return Gated(*args, **kwargs)


def cool_router(*args: Any, **kwargs: Any) -> Any:
    """A router that halves its logits."""
    from megatron.core.transformer.moe.router import TopKRouter

    class Cool(TopKRouter):  # type: ignore[misc]
        def gating(self, hidden: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = super().gating(hidden)
            return logits / 2

    return Cool(*args, **kwargs)


def logprobs(trainer: Any) -> Any:
    found = trainer.logprobs(make_batch(), "policy", 0)
    trainer.stop()
    return found


def expected(folder: Path, changes: dict[str, float]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for ending, factor in changes.items():
                if name.endswith(ending):
                    parameter.mul_(factor)
        return batch_logprobs(model, make_batch()).numpy()


def test_a_gate_after_attention_is_built_loaded_trained_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=2)
    without = expected(folder, {"o_proj.weight": 0.5})  # sigmoid(0)
    gate = Weight(
        megatron="decoder.layers.{layer}.self_attention.core_attention.gate",
        hf=("model.layers.{layer}.self_attn.gate",),
    )
    model = qwen3({**config_of("qwen3"), "num_hidden_layers": 2})
    model = dataclasses.replace(
        model,
        weights=(*model.weights, gate),
        modules={"self_attention.core_attention": "test_modules:gated_attention"},
    )
    monkeypatch.setattr(families, "describe", lambda config: model)
    tensors = load_file(folder / "model.safetensors")
    gates = {f"model.layers.{layer}.self_attn.gate": torch.zeros(64) for layer in range(2)}
    save_file({**tensors, **gates}, folder / "model.safetensors")
    np.testing.assert_allclose(logprobs(make_trainer(folder)), without, atol=2e-5)
    trainer = make_trainer(folder)
    trainer.update(make_batch(0), 0, 1)
    trainer.save_pretrained(tmp_path / "trained")
    trainer.stop()
    learnt = load_file(tmp_path / "trained" / "model.safetensors")
    assert learnt.keys() == tensors.keys() | gates.keys()
    assert all(learnt[name].abs().max() > 0 for name in gates)


def test_a_router_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model", "qwen3-moe")
    model = dataclasses.replace(qwen3_moe(config_of("qwen3-moe")), modules={"mlp.router": "test_modules:cool_router"})
    monkeypatch.setattr(families, "describe", lambda config: model)
    np.testing.assert_allclose(logprobs(make_trainer(folder)), expected(folder, {"mlp.gate.weight": 0.5}), atol=2e-5)


def test_a_place_that_there_is_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    model = dataclasses.replace(qwen3(config_of("qwen3")), modules={"mlp.ruter": "test_modules:cool_router"})
    monkeypatch.setattr(families, "describe", lambda config: model)
    with pytest.raises(UserError, match=r"has no place 'mlp\.ruter'"):
        make_trainer(folder)
