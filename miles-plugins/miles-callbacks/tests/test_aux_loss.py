"""aux-loss-probe against the gradient of the same loss in plain PyTorch, sample by sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callback_kit import Recorder, batch_of, make_trainer

from miles_callbacks import options
from miles_callbacks.aux_loss import AuxLossProbe
from miles_core.sample import Batch
from miles_core.testing.models import make_model


def plain(batch: Batch, coefficient: float) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of sum(weights * losses) + coefficient * mean(z^2), and mean(z^2)."""
    model = make_model()
    objective, squares = torch.zeros(()), []
    for sample in range(len(batch)):
        start, end = int(batch.cu_seqlens[sample]), int(batch.cu_seqlens[sample + 1])
        rows = start + np.flatnonzero(batch["mask"][start:end])
        tokens = torch.from_numpy(batch["tokens"][start:end].astype(np.int64))
        logits = model(tokens[None]).logits[0, rows - start - 1]
        logprobs = logits.log_softmax(-1).gather(1, tokens[rows - start, None])[:, 0]
        scale = torch.from_numpy(batch["weights"][rows] * batch["advantages"][rows]).float()
        objective = objective - (scale * logprobs).sum()
        squares.append(logits.logsumexp(-1).square())
    mean = torch.cat(squares).mean()
    (objective + coefficient * mean).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, float(mean.detach())


@pytest.mark.parametrize("settings", [{}, {"micro_batch_tokens": 8}, {"activation_checkpointing": True}])
def test_gradient_and_metric_are_those_of_the_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    recorder, batch = Recorder(), batch_of()
    trainer = make_trainer(tmp_path, [AuxLossProbe(options.AuxLossProbe(coefficient=0.5)), recorder], **settings)
    metrics = trainer.update(batch, 0, 1)
    gradients, mean = plain(batch, 0.5)
    assert metrics["aux_loss/z"] == pytest.approx(mean, rel=1e-5)
    assert recorder.gradients[0].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recorder.gradients[0][name], gradient, rtol=1e-4, atol=1e-5)


def test_with_coefficient_0_it_only_measures(tmp_path: Path) -> None:
    recorder, batch = Recorder(), batch_of()
    make_trainer(tmp_path, [recorder]).update(batch, 0, 1)
    trainer = make_trainer(tmp_path, [AuxLossProbe(options.AuxLossProbe(coefficient=0.0)), recorder])
    metrics = trainer.update(batch, 0, 1)
    without, measured = recorder.gradients
    assert all(torch.equal(without[name], measured[name]) for name in without)
    assert metrics["aux_loss/z"] == pytest.approx(plain(batch, 0.0)[1], rel=1e-5)


def test_it_listens_only_while_a_step_is_trained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [AuxLossProbe(options.AuxLossProbe())])
    for step in range(2):
        trainer.update(batch_of(), step, 1)
        assert len(trainer._policy.model.lm_head._forward_hooks) == 0


def test_logits_drift_less_with_it(tmp_path: Path) -> None:
    def last(coefficient: float) -> float:
        trainer = make_trainer(tmp_path, [AuxLossProbe(options.AuxLossProbe(coefficient=coefficient))])
        return [trainer.update(batch_of(), step, 1)["aux_loss/z"] for step in range(8)][-1]

    assert last(1.0) < 0.9 * last(0.0)


def test_mini_batches_have_means_of_their_own(tmp_path: Path) -> None:
    recorder, batch = Recorder(), batch_of(minibatches=2)
    trainer = make_trainer(tmp_path, [AuxLossProbe(options.AuxLossProbe(coefficient=0.5)), recorder])
    trainer.update(batch, 0, 1)
    gradients, _ = plain(batch.select(np.flatnonzero(batch.samples["minibatch"] == 0)), 0.5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recorder.gradients[0][name], gradient, rtol=1e-4, atol=1e-5)
