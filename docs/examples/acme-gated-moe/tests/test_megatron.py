"""The family in Megatron-core against the same model in transformers: `modeling`, in plain PyTorch.

`python test_megatron.py FOLDER RANK` is one of two tensor-parallel ranks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miles_core.lifecycle import lifecycle
from miles_core.roles import LossInputs, LossOutputs, TrainStage
from miles_core.testing.fakes import make_batch
from miles_core.testing.models import TINY, batch_logprobs, randomised, save_model, trainer_context
from miles_megatron.options import TrainerOptions
from miles_megatron.start import make_trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from acme_gated_moe.backends import transformers
from acme_gated_moe.family import GatedMoe, example

LAYERS = range(4)
DENSE, UNGATED = 0, 1  # layers of the example
OPTIMIZER = {"lr": 1e-3, "clip_grad": 1.0}


class Listener:
    """A trainer callback that keeps the model."""

    def model_built(self, context: Any, model: Any) -> None:
        self.model = model


def policy_gradient(inputs: LossInputs, options: None) -> LossOutputs:
    assert inputs.advantages is not None
    return LossOutputs(losses=-inputs.logprobs * inputs.advantages, metrics={})


def batch() -> Any:
    """Some samples of tokens of the tiny vocabulary, with advantages."""
    made, rng = make_batch(), np.random.default_rng(9)
    mask = made["mask"]
    tokens = np.where(mask, rng.integers(0, TINY["vocab_size"], len(mask)), made["tokens"] % TINY["vocab_size"])
    return made.with_samples(minibatch=np.zeros(len(made), np.int32)).with_columns(
        tokens=tokens.astype(np.int32),
        weights=mask / mask.sum(),
        advantages=np.where(mask, rng.standard_normal(len(mask)), 0.0),
    )


def trainer_on(folder: Path, *, hooks: Any = None, rank: int = 0, ranks: int = 1) -> Any:
    """The trainer `megatron`; with two ranks they are tensor parallel."""
    parallel = {"tensor_model_parallel_size": ranks, "sequence_parallel": ranks > 1}
    options = TrainerOptions(optimizer=OPTIMIZER, parallel=parallel)
    context = trainer_context(folder, 0, hooks=hooks)
    if ranks > 1:
        context = replace(context, rank=rank, world_size=ranks, address=f"file://{folder}/meeting")
    trainer = make_trainer(options, context)
    trainer.start()
    trainer.begin(
        TrainStage(
            name="test",
            loss=policy_gradient,
            loss_options=None,
            entropy=False,
            needs=frozenset({"advantages"}),
            optimizer_steps=1,
            options=options,
        )
    )
    return trainer


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[T] -> [T, V], by Megatron's model as a callback sees it."""
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=len(tokens),
        max_seqlen_kv=len(tokens),
    )
    positions = torch.arange(len(tokens))
    with torch.no_grad():
        found: torch.Tensor = model(tokens[None], positions[None], attention_mask=None, packed_seq_params=packed)
    return found[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny model, written by transformers."""
    path = tmp_path_factory.mktemp("family") / "model"
    config = GatedMoe().fresh({**TINY, **example(path).config})
    save_model(randomised(transformers(config), torch.Generator().manual_seed(3)), path)
    (path / "config.json").write_text(json.dumps(config))
    return path


def trained(trainer: Any, folder: Path) -> dict[str, Any]:
    """Log-probabilities before and after an optimizer step, its metrics; the policy goes to FOLDER/trained."""
    given = batch()
    before = trainer.logprobs(given, "policy", 0)
    metrics = trainer.update(given, 0, 1)
    after = trainer.logprobs(given, "policy", 1)
    trainer.save_pretrained(folder / "trained")
    trainer.stop()
    return {"before": before, "metrics": dict(metrics), "after": after}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """One rank: logits, the folder that comes back, and a step."""
    listener = Listener()
    trainer = trainer_on(folder, hooks=lifecycle("trainer", [listener]))
    tokens = torch.arange(20) * 7 % TINY["vocab_size"]
    logits = logits_of(listener.model, tokens)
    names = [name for bucket in trainer.layout() for name in bucket.names]
    trainer.save_pretrained(folder / "again")
    return {"tokens": tokens, "logits": logits, "names": names, **trained(trainer, folder)}


def test_logits_are_those_of_plain_pytorch(folder: Path, alone: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(alone["tokens"][None]).logits[0]
        logprobs = batch_logprobs(model, batch()).numpy()
    assert expected.std() > 1
    torch.testing.assert_close(alone["logits"][:, : TINY["vocab_size"]], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(alone["before"], logprobs, rtol=0, atol=1e-4)


def test_tensors_come_back_bit_for_bit_each_once(folder: Path, alone: dict[str, Any]) -> None:
    before, after = load_file(folder / "model.safetensors"), load_file(folder / "again" / "model.safetensors")
    assert sorted(alone["names"]) == sorted(before) == sorted(after)
    assert all(before[name].equal(after[name]) for name in before)


def test_a_step_moves_gates_and_scales_and_both_exist_where_they_should(folder: Path, alone: dict[str, Any]) -> None:
    before, after = load_file(folder / "model.safetensors"), load_file(folder / "trained" / "model.safetensors")
    gates = {f"model.layers.{layer}.self_attn.gate_proj.weight" for layer in LAYERS if layer != UNGATED}
    scales = {f"model.layers.{layer}.mlp.gate.scale" for layer in LAYERS if layer != DENSE}
    assert {name for name in before if name.endswith(("attn.gate_proj.weight", "scale"))} == gates | scales
    assert all((before[name] != after[name]).any() for name in gates | scales)


def test_two_tensor_parallel_ranks_compute_the_same(folder: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    weights = load_file(folder / "trained" / "model.safetensors")
    ranks = [subprocess.Popen([sys.executable, __file__, str(folder), str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=250) for rank in ranks] == [0, 0]
    both = np.load(folder / "two-ranks.npz")
    for name in ("loss", "grad_norm"):
        assert both[name] == pytest.approx(alone["metrics"][name], rel=1e-5)
    np.testing.assert_allclose(both["before"], alone["before"], atol=2e-5)
    np.testing.assert_allclose(both["after"], alone["after"], atol=2e-4)
    for name, tensor in load_file(folder / "trained" / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, own = Path(sys.argv[1]), int(sys.argv[2])
    result = trained(trainer_on(where, rank=own, ranks=2), where)
    if own == 0:
        metrics = {name: result["metrics"][name] for name in ("loss", "grad_norm")}
        np.savez(where / "two-ranks.npz", before=result["before"], after=result["after"], **metrics)
