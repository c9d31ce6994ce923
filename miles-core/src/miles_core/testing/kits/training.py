"""What the rules of a trainer, its critic and a model family have in common: a tiny model, a batch, and a stage.

The loss is a policy gradient, sum over tokens of weight * (-exp(log pi - log pi_old) * advantage).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from miles_core.roles import Bucket, LossInputs, LossOutputs, TrainStage
from miles_core.sample import Batch
from miles_core.testing.fakes import make_batch
from miles_core.testing.models import VOCABULARY

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-5
"""Relative. Sums of float32 in another order differ by up to 2e-6 on this model."""


def policy_loss(inputs: LossInputs, options: Any) -> LossOutputs:
    """The loss of these rules."""
    assert inputs.advantages is not None
    old = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    return LossOutputs(losses=-(inputs.logprobs - old).exp() * inputs.advantages)


def training_batch(seed: int = 0) -> Batch:
    """Three groups with shared prompts, tokens of the tiny vocabulary, weights and advantages."""
    batch = make_batch(seed=seed)
    rng = np.random.default_rng([9, seed])
    mask = batch["mask"]
    tokens = (batch["tokens"] % VOCABULARY).astype(np.int32)
    tokens[mask] = rng.integers(0, VOCABULARY, int(mask.sum()))
    weights = np.where(mask, 1.0 / mask.sum(), 0.0)
    advantages = np.where(mask, rng.standard_normal(len(mask)), 0.0)
    batch = batch.with_samples(minibatch=np.zeros(len(batch), np.int32))
    return batch.with_columns(tokens=tokens, weights=weights, advantages=advantages)


POLICY_COLUMNS = frozenset({"advantages", "old_logprobs"})
"""What `policy_loss` reads."""


def training_stage(
    options: Any, loss: Callable[[Any, Any], LossOutputs] = policy_loss, needs: frozenset[str] = POLICY_COLUMNS
) -> TrainStage:
    """A stage of four steps. options: the trainer's; needs: token columns that the loss reads."""
    return TrainStage(
        name="contract",
        loss=loss,
        loss_options=None,
        entropy=False,
        needs=needs,
        optimizer_steps=4,
        options=options,
    )


def update_around_save(trained: Any, first: Batch, second: Batch, folder: Path) -> None:
    """Trains a trainer or a critic on one batch, saves it into `folder`, and trains it on another meanwhile."""
    trained.update(first, 0, 1)
    written = trained.save(folder)
    trained.update(second, 1, 1)
    if written is not None:
        written(True)


def unpacked(buckets: Iterable[Bucket]) -> dict[str, Tensor]:
    """Copies of the tensors by their names, on the CPU."""
    return {name: tensor.detach().cpu().clone() for bucket in buckets for name, tensor in bucket.tensors().items()}


def weight_faults(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Iterator[str]:
    """What differs between two sets of weights, bit for bit."""
    for name in sorted(expected.keys() ^ got.keys()):
        yield f"{name} is {'missing' if name in expected else 'not a parameter of the model'}"
    for name in sorted(expected.keys() & got.keys()):
        if not expected[name].equal(got[name]):
            yield f"{name} differs"
