"""Sharding over ranks and mixed precision, with real processes over gloo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trainer_kit import make_batch, tiny_model
from trainer_rank import free_address, train, train_on_ranks

POISONED = np.flatnonzero(make_batch(0)["mask"])[[0, -1]]
SMALL = {"micro_batch_tokens": 30, "activation_checkpointing": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory):
    """The runs that need two ranks, in one pair of processes: starting them is what takes time."""
    out = tmp_path_factory.mktemp("two")
    train(folder, seeds=[0, 1], save=str(out / "single"))
    whole, small, divided, resumed, *poisoned = train_on_ranks(
        out,
        2,
        [
            {"model": folder, "seeds": [0, 1], "save": str(out / "saved"), "pretrained": str(out / "pretrained")},
            {"model": folder, "seeds": [0, 1], "options": SMALL},
            {"model": folder, "seeds": [0], "minibatches": 12},
            {"model": folder, "seeds": [2], "restore": str(out / "single")},
            *({"model": folder, "seeds": [0], "poison": int(row)} for row in POISONED),
        ],
    )
    return {"whole": whole, "small": small, "divided": divided, "resumed": resumed, "poisoned": poisoned, "folder": out}


def assert_same_training(found, expected):
    """Loss and gradient norm equal; weights equal but for what Adam makes of the rounding of tiny gradients."""
    for mine, other in zip(found["metrics"], expected["metrics"], strict=True):
        for name in (
            "loss",
            "grad_norm",
            "entropy",
            "tokens",
            "mismatch/kl",
            "mismatch/logprob_abs",
            "mismatch/logprob_abs_max",
            "learning_rate",
        ):
            assert mine[name] == pytest.approx(other[name], rel=1e-5), name
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in found["weights"].items():
        torch.testing.assert_close(tensor, expected["weights"][name], atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(found["logprobs"], expected["logprobs"], atol=1e-3)


@pytest.mark.parametrize("run", ["whole", "small"])
def test_two_ranks_train_as_one(folder, two_ranks, run):
    assert_same_training(two_ranks[run], train(folder, seeds=[0, 1]))


def test_a_rank_without_a_sample_of_the_mini_batch_keeps_in_step(folder, two_ranks):
    assert_same_training(two_ranks["divided"], train(folder, seeds=[0], minibatches=12))


def test_a_checkpoint_goes_on_at_another_number_of_ranks(folder, two_ranks):
    whole = train(folder, seeds=[0, 1, 2])
    expected = {**whole, "metrics": whole["metrics"][2:]}
    assert_same_training(train(folder, seeds=[2], restore=str(two_ranks["folder"] / "saved")), expected)
    assert_same_training(two_ranks["resumed"], expected)


def test_every_rank_names_the_token_that_is_not_finite(two_ranks):
    batch = make_batch(0)
    for row, run in zip(POISONED, two_ranks["poisoned"], strict=True):
        sample = batch.segment_ids[row]
        name = f"{batch.samples['group'][sample]}/{batch.samples['index'][sample]}"
        assert f"sample {name}, token {row - batch.cu_seqlens[sample]} " in run["metrics"][0]["error"]


def test_two_ranks_export_what_transformers_loads(two_ranks):
    loaded = load_file(two_ranks["folder"] / "pretrained" / "model.safetensors")
    assert loaded.keys() == two_ranks["whole"]["weights"].keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, two_ranks["whole"]["weights"][name])


def test_bfloat16_computes_in_bfloat16_from_float32_weights(folder, tmp_path):
    single = train(folder, seeds=[0, 1, 2])
    found = train(folder, seeds=[0, 1, 2], options={"dtype": "bfloat16"}, save=str(tmp_path), address=free_address())
    for mine, other in zip(found["metrics"], single["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=0.05)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)
        assert mine["loss"] != other["loss"]
        assert mine["ppo_kl"] == 0.0
    assert {tensor.dtype for tensor in found["weights"].values()} == {torch.bfloat16}
    masters = load_file(tmp_path / "weights-00000.safetensors")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    for name, tensor in masters.items():
        assert torch.equal(tensor.bfloat16(), found["weights"][name])
