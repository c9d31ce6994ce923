"""The critic: values, loss, gradients and steps equal plain PyTorch; it shares a process; it goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from critic_kit import CLIP, make_critic, train_both, train_both_on_ranks, valued_batch
from safetensors.torch import load_file
from trainer_kit import make_trainer, norm, plain_model, tiny_model
from trainer_rank import free_address

from miles_core.errors import RunError, UserError
from miles_core.sample import Batch
from miles_torch.model import weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


class Plain(torch.nn.Module):
    """transformers' own model, and a head of one output, on each sample by itself."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.body = plain_model(folder, tensors).model
        self.head = torch.nn.Parameter(tensors["score.weight"].clone())

    def values(self, batch: Batch, sample: int) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
        """Of the trained tokens, and their places."""
        start, end = batch.cu_seqlens[sample], batch.cu_seqlens[sample + 1]
        rows = start + np.flatnonzero(batch["mask"][start:end])
        hidden = self.body(torch.from_numpy(batch["tokens"][start:end]).long()[None]).last_hidden_state[0]
        return (hidden @ self.head[0])[rows - start - 1], rows

    def objective(self, batch: Batch) -> torch.Tensor:
        """Of `critic_kit.value_loss`."""
        total = torch.zeros(())
        for sample in range(len(batch)):
            values, rows = self.values(batch, sample)
            if not len(rows):
                continue
            returns, old, own = (
                torch.from_numpy(batch[name][rows]).float() for name in ("returns", "values", "weights")
            )
            errors = torch.stack([(values - returns) ** 2, (values.clamp(old - CLIP, old + CLIP) - returns) ** 2])
            total = total + (own * (errors.max(0).values + 0.1 * values.mean())).sum()
        return total


def plain(critic, folder) -> Plain:
    return Plain(folder, {name: tensor.detach().clone() for name, tensor in weights(critic._policy.model).items()})


@pytest.mark.parametrize("changes", [{}, {"micro_batch_tokens": 20}], ids=["whole", "small"])
@pytest.mark.parametrize("tied", [True, False])
def test_values_are_those_of_a_plain_forward(tmp_path, changes, tied):
    folder = tiny_model(tmp_path, tie_word_embeddings=tied)
    critic, batch = make_critic(folder, **changes), valued_batch()
    reference, expected = plain(critic, folder), np.zeros(batch.tokens_total)
    with torch.no_grad():
        for sample in range(len(batch)):
            values, rows = reference.values(batch, sample)
            expected[rows] = values.numpy()
    got = critic.values(batch, 0)
    assert np.abs(got).max() > 0.01
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not got[~batch["mask"]].any()


@pytest.mark.parametrize("changes", [{}, {"micro_batch_tokens": 20, "activation_checkpointing": True}])
def test_a_step_is_that_of_plain_pytorch(folder, changes):
    critic, batch = make_critic(folder, **changes), valued_batch()
    reference = plain(critic, folder)
    loss = reference.objective(batch)
    loss.backward()
    gradients = norm(reference)
    metrics = critic.update(batch, 0, 1)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(gradients, rel=1e-5)
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95)).step()
    found = weights(critic._policy.model)
    torch.testing.assert_close(found["score.weight"].data, reference.head.data, atol=1e-5, rtol=1e-4)
    for name, tensor in reference.body.state_dict().items():
        torch.testing.assert_close(found[f"model.{name}"].data, tensor, atol=1e-4, rtol=1e-3)


def test_the_head_is_new_and_the_language_models_own_is_gone(folder):
    critic, other = make_critic(folder), make_critic(folder)
    names = set(weights(critic._policy.model))
    assert "score.weight" in names
    assert "lm_head.weight" not in names
    head = critic._policy.model.score.weight
    assert head.shape == (1, 32)
    assert 0.3 / 33 < float(head.detach().std()) < 3 / 33
    assert torch.equal(head, other._policy.model.score.weight)


def test_a_critic_takes_over_a_policys_weights(folder, tmp_path):
    policy, critic = make_trainer(folder), make_critic(folder)
    head = critic._policy.model.score.weight.detach().clone()
    policy.update(valued_batch(), 0, 1)
    policy.save_pretrained(tmp_path)
    critic.load_pretrained(tmp_path)
    found = weights(critic._policy.model)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(found[name].detach(), tensor)
    assert torch.equal(found["score.weight"], head)


def test_another_models_weights_are_refused(folder, tmp_path):
    make_trainer(tiny_model(tmp_path / "wide", intermediate_size=80)).save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match=r"does not fit the critic: 'model\.layers\.0\.mlp"):
        make_critic(folder).load_pretrained(tmp_path / "policy")


def test_two_ranks_that_share_policy_and_critic_train_as_one(folder, tmp_path):
    expected = train_both(str(folder), seeds=[0, 1])
    found = train_both_on_ranks(tmp_path, 2, model=str(folder), seeds=[0, 1])
    for mine, other in zip(found["metrics"], expected["metrics"], strict=True):
        for name in ("loss", "grad_norm", "value", "tokens"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5), name
    for mine, other in zip(found["columns"], expected["columns"], strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-3)


def test_a_critic_goes_on_bit_for_bit_in_a_new_process(folder, tmp_path):
    whole = train_both(str(folder), seeds=[0, 1, 2, 3], save=str(tmp_path / "whole"))
    train_both(str(folder), seeds=[0, 1], save=str(tmp_path / "half"))
    rest = train_both_on_ranks(
        tmp_path, 1, model=str(folder), seeds=[2, 3], restore=str(tmp_path / "half"), save=str(tmp_path / "rest")
    )
    assert rest["metrics"] == whole["metrics"][2:]
    np.testing.assert_array_equal(rest["columns"][0], whole["columns"][0])
    for stem in ("weights-00000", "optimizer-00000"):
        found = load_file(tmp_path / "rest" / f"{stem}.safetensors")
        expected = load_file(tmp_path / "whole" / f"{stem}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), stem


def test_in_bfloat16_values_are_not_rounded(folder):
    single = make_critic(folder).values(valued_batch(), 0)
    critic = make_critic(folder, dtype="bfloat16", address=free_address())
    values = critic.values(valued_batch(), 0)
    critic.stop()
    np.testing.assert_allclose(values, single, atol=0.05)
    assert (torch.from_numpy(values).bfloat16().float().numpy() != values).any()


@pytest.mark.parametrize("column", ["returns", "values"])
def test_what_is_not_finite_names_its_token(folder, column):
    critic, batch = make_critic(folder), valued_batch()
    row = int(np.flatnonzero(batch["mask"])[3])
    sample = batch.segment_ids[row]
    broken = batch[column].copy()
    broken[row] = np.nan
    name = f"{batch.samples['group'][sample]}/{batch.samples['index'][sample]}"
    with pytest.raises(RunError, match=rf"sample {name}, token {row - batch.cu_seqlens[sample]} .*: value .*loss nan"):
        critic.update(batch.with_columns(**{column: broken}), 0, 1)
