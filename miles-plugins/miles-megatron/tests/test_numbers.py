"""One rank against transformers and the trainer `torch`: logits, weights both ways, optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_kit import (
    MODELS,
    by_transformers,
    make_batch,
    make_model,
    make_trainer,
    one_by_one,
    stage,
    torch_trainer,
    train,
)
from safetensors.torch import load_file

from miles_core.errors import UserError
from miles_megatron.options import TrainerOptions
from miles_megatron.packing import Cut, MicroBatch, pieces, row


def logits(trainer: Any, batch: Any) -> list[torch.Tensor]:
    """Of each sample without its last token, packed together into one row."""
    found = pieces(batch, range(len(batch)), Cut())
    indices = row(batch, MicroBatch(tuple(found)), Cut())
    chunk, packed = trainer._chunks[0], trainer._passes._packed(indices)
    tokens, positions = torch.from_numpy(indices.tokens)[None], torch.from_numpy(indices.positions)[None]
    with torch.no_grad():
        out = chunk(input_ids=tokens, position_ids=positions, attention_mask=None, packed_seq_params=packed)
    vocabulary = trainer._model.gpt["vocab_size"]
    return [out[0, start:end, :vocabulary] for start, end in zip(indices.bounds, indices.bounds[1:], strict=False)]


def check_logits(trainer: Any, folder: Path) -> None:
    """Within 1e-4 of transformers', for each sample of a packed row."""
    batch, model = make_batch(), by_transformers(folder)
    own = logits(trainer, batch)
    for piece, found in zip(pieces(batch, range(len(batch)), Cut()), own, strict=True):
        start = int(batch.cu_seqlens[piece.sample])
        tokens = torch.from_numpy(batch["tokens"][start : start + piece.length]).long()
        with torch.no_grad():
            torch.testing.assert_close(found, model(tokens[None]).logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_weights_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "model", name)
    trainer = make_trainer(folder)
    check_logits(trainer, folder)
    names = [name for part in trainer.layout() for name in part.names]
    before = load_file(folder / "model.safetensors")
    assert sorted(names) == sorted(before)
    trainer.save_pretrained(tmp_path / "again")
    trainer.stop()
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)  # fmt: skip
def test_stretched_positions_are_those_of_transformers(tmp_path: Path, scaling: dict[str, Any]) -> None:
    positions = {"rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 131072}
    folder = make_model(tmp_path / "model", "llama", head_dim=32, **positions)
    trainer = make_trainer(folder)
    assert trainer._model.gpt.keys() & {"rope_scaling", "seq_len_interpolation_factor"}
    check_logits(trainer, folder)
    trainer.stop()


@pytest.mark.parametrize("name", MODELS)
def test_an_optimizer_step_is_that_of_the_trainer_torch(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "model", name)
    results = []
    for make in (make_trainer, torch_trainer):
        trainer = make(folder)
        results.append(train(trainer, [0]))
        trainer.stop()
    own, reference = results
    assert own["metrics"][0].keys() == reference["metrics"][0].keys()
    for metric, value in reference["metrics"][0].items():
        if metric != "train_seconds":
            assert own["metrics"][0][metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    for weight, tensor in one_by_one(reference["weights"]).items():
        np.testing.assert_allclose(own["weights"][weight], tensor, rtol=1e-5, atol=1e-5)
    for found, value in zip([own["before"], *own["after"]], [reference["before"], *reference["after"]], strict=True):
        np.testing.assert_allclose(found, value, atol=1e-4)


def test_old_logprobs_and_those_of_training_are_equal_before_an_update(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(tmp_path / "model"))
    batch = make_batch(minibatches=2)
    batch = batch.with_columns(old_logprobs=trainer.logprobs(batch, "policy", 0))
    first = batch.select(np.flatnonzero(batch.samples["minibatch"] == 0))
    metrics = trainer.update(first, 0, 1)
    trainer.stop()
    assert abs(metrics["ppo_kl"]) < 1e-9


def test_a_folder_without_weights_gives_the_same_random_ones_every_time(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    found = []
    for _ in range(2):
        trainer = make_trainer(folder)
        found.append(train(trainer, [])["weights"])
        trainer.stop()
    first, second = found
    assert all(np.array_equal(first[name], second[name]) for name in first)
    embedding = first["model.embed_tokens.weight"]
    assert 0.015 < float(embedding.std()) < 0.025
    assert np.array_equal(first["model.norm.weight"], np.ones(32))


def test_an_optimizer_that_cannot_be_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(tmp_path / "model", num_hidden_layers=1))
    for options, error in (
        ({"optimizer": "adamww"}, "package is required for optimizer='adamww'"),
        ({"optimizer": "sgd"}, "Only Adam, .* are currently supported"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ):
        with pytest.raises(UserError, match=rf"^\[trainer.optimizer\]: Megatron-core refuses this: .*{error}"):
            trainer.begin(stage(TrainerOptions(optimizer=options)))
    trainer.stop()


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks the tensor model.norm.weight, which"),
        (lambda tensors: tensors.update({"model.odd.weight": torch.ones(2)}), "holds the tensor model.odd.weight, "),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}),
            r"model.norm.weight has shape \(7,\), but the model's config.json makes it \(32,\)",
        ),
    ],
)
def test_a_folder_with_other_tensors_is_refused(tmp_path: Path, damage: Any, error: str) -> None:
    from safetensors.torch import save_file

    folder = make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, error)


def test_a_truncated_file_of_weights_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(folder, "model.safetensors is damaged or incomplete")


def refused(folder: Path, error: str) -> None:
    with pytest.raises(UserError, match=error):
        make_trainer(folder)
