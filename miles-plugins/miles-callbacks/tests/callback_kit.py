"""A trainer of miles-torch on a tiny model, a batch for it, and a callback that takes the gradients down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles_core.plugins import lifecycle
from miles_core.roles import LossInputs, LossOutputs, TrainStage
from miles_core.sample import Batch
from miles_core.testing.fakes import make_batch
from miles_core.testing.models import VOCABULARY, make_model, save_model, trainer_context
from miles_torch.options import OptimizerOptions, TrainerOptions
from miles_torch.trainer import TorchTrainer

BAD = 0.125
"""The advantage that marks the token whose loss is infinite, and whose gradient is not finite either."""
STEEP = 0.0625
"""The advantage that marks the token whose loss is finite and has a gradient that is not."""

STEPS: list[dict[str, Any]] = [{}, {"bad": [4]}, {}, {"steep": [9]}]
"""What `batch_of` is told at each step of two ranks."""


def policy_loss(inputs: LossInputs, options: Any) -> LossOutputs:
    """A policy gradient. Not finite where the advantage is `BAD`; only its gradient is not where it is `STEEP`."""
    assert inputs.advantages is not None
    steep = torch.where(inputs.advantages == STEEP, 0.0 * inputs.logprobs, 1.0).sqrt()  # sqrt is vertical at 0
    broken = (inputs.advantages == BAD).float() / 0.0  # 0 / 0 is not a number, 1 / 0 is infinite
    broken = broken.nan_to_num(nan=0.0, posinf=torch.inf)
    return LossOutputs(losses=-inputs.logprobs * inputs.advantages * (1.0 + broken) + steep - 1.0)


def batch_of(seed: int = 0, bad: Sequence[int] = (), steep: Sequence[int] = (), minibatches: int = 1) -> Batch:
    """bad, steep: samples whose last token makes a loss, or only a gradient, that is not finite."""
    batch = make_batch(seed=seed)
    rng = np.random.default_rng(seed)
    tokens = (batch["tokens"] % VOCABULARY).astype(np.int32)
    advantages = np.where(batch["mask"], rng.standard_normal(batch.tokens_total), 0.0)
    for samples, mark in ((bad, BAD), (steep, STEEP)):
        for sample in samples:
            advantages[batch.cu_seqlens[sample + 1] - 1] = mark
    batch = batch.with_samples(minibatch=(np.arange(len(batch)) % minibatches).astype(np.int32))
    weights = batch["mask"] / batch["mask"].sum()
    return batch.with_columns(tokens=tokens, advantages=advantages, weights=weights)


class Recorder:
    """Keeps the gradients of each optimizer step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def before_train_step(self, model: Any, optimizer: Any) -> None:
        def keep(*_: Any) -> None:
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            self.gradients.append(found)
            handle.remove()

        handle = optimizer.register_step_pre_hook(keep)


def make_trainer(
    folder: Path, callbacks: Sequence[object], *, rank: int = 0, world_size: int = 1, address: str = "", **options: Any
) -> TorchTrainer:
    """A trainer with these callbacks that has begun a stage; gradients are not clipped."""
    from dataclasses import replace

    if not (folder / "config.json").exists():
        save_model(make_model(), folder)
    chosen = TrainerOptions(optimizer=OptimizerOptions(learning_rate=1e-3, max_grad_norm=0.0), **options)
    context = trainer_context(folder, 0, hooks=lifecycle("trainer", callbacks))
    context = replace(context, rank=rank, world_size=world_size, address=address or context.address)
    trainer = TorchTrainer(chosen, context)
    trainer.start()
    trainer.begin(
        TrainStage(
            name="only",
            loss=policy_loss,
            loss_options=None,
            entropy=False,
            needs=frozenset({"advantages"}),
            optimizer_steps=8,
            options=chosen,
        )
    )
    return trainer


def weights(trainer: TorchTrainer) -> torch.Tensor:
    """All of the policy's weights, end to end."""
    return torch.cat([bucket.flat.clone() for bucket in trainer.export()])
