"""Rules of a trainer: it trains a tiny model, and transformers and plain PyTorch say what it must have computed.

The loss is a policy gradient, sum over tokens of weight * (-exp(log pi - log pi_old) * advantage).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from miles_core.roles import LossInputs, LossOutputs, TrainStage
from miles_core.sample import Batch
from miles_core.specs import TrainerSpec
from miles_core.testing.fakes import make_batch
from miles_core.testing.models import (
    VOCABULARY,
    batch_logprobs,
    gpus_for,
    make_model,
    save_model,
    trainer_context,
    weights_of,
)
from miles_core.testing.subject import Subject, skip

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-3


def gives_the_logprobs_of_the_model(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """Log-probabilities of a packed batch are transformers' own for each sample alone, and 0 where masked."""
    import torch

    trainer, batch = _trainer(subject), _batch()
    column = trainer.logprobs(batch, "policy", 0)
    trainer.stop()
    with torch.no_grad():
        expected = batch_logprobs(make_model(), batch).numpy()
    if column is None or column.shape != expected.shape:
        yield f"logprobs has the shape {None if column is None else column.shape} for {len(expected)} tokens"
        return
    apart = float(np.abs(column - expected).max())
    if apart > TOLERANCE:
        yield f"a log-probability differs by {apart:.3g}"
    if (column[~batch["mask"]] != 0).any():
        yield "log-probabilities are not 0 where masked"


def has_the_gradient_of_the_objective(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """Loss and gradient norm are those of plain PyTorch, however the batch is cut into micro-batches."""
    batch = _batch()
    model = make_model()
    logprobs = batch_logprobs(model, batch)
    loss = _plain_loss(logprobs, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = float(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None) ** 0.5)
    trainer = _trainer(subject)
    metrics = trainer.update(batch, 0, 1)
    trainer.stop()
    for name, expected in {"loss": float(loss.detach()), "grad_norm": norm}.items():
        if name not in metrics:
            yield f"update reports no {name}"
        elif abs(metrics[name] - expected) > TOLERANCE * max(1.0, abs(expected)):
            yield f"{name} is {metrics[name]:.6g} and not {expected:.6g}"


def learns(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """An optimizer step on the same batch makes good tokens likelier and bad ones less likely."""
    trainer, batch = _trainer(subject), _batch()
    before = trainer.logprobs(batch, "policy", 0)
    trainer.update(batch, 0, 1)
    after = trainer.logprobs(batch, "policy", 1)
    trainer.stop()
    gain = float((batch["weights"] * batch["advantages"] * (after - before)).sum())
    if gain <= 0:
        yield f"the mean of advantage times the change of log-probability is {gain:.3g}; it must rise"


def keeps_the_reference(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """If it gives ref_logprobs: they stay those of the weights that the stage began with."""
    if "ref_logprobs" not in subject.spec.gives:
        skip("it gives no ref_logprobs")
    trainer, batch = _trainer(subject, reference=True), _batch()
    before = trainer.logprobs(batch, "reference", 0)
    trainer.update(batch, 0, 1)
    after = trainer.logprobs(batch, "reference", 1)
    trainer.stop()
    if not np.array_equal(before, after):
        yield f"after a step the reference differs by {float(np.abs(before - after).max()):.3g}"


def exports_what_its_layout_says(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """Its weights leave under their Hugging Face names, each once, with the bytes that came in."""
    trainer = _trainer(subject)
    layout = list(trainer.layout())
    buckets = list(trainer.export())
    exported = _unpacked(buckets)
    trainer.stop()
    if [(bucket.names, bucket.shapes) for bucket in buckets] != [(part.names, part.shapes) for part in layout]:
        yield "`export` does not yield what `layout` says"
    names = [name for bucket in buckets for name in bucket.names]
    yield from (f"{name} is exported {names.count(name)} times" for name in set(names) if names.count(name) > 1)
    yield from weight_faults(weights_of(make_model()), exported)


def continues_exactly_from_a_checkpoint(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """Saved, restored into a new trainer, and trained on: the same weights, bit for bit."""
    first, second = _batch(0), _batch(1)
    one = _trainer(subject)
    one.update(first, 0, 1)
    one.save(subject.folder / "saved")
    one.update(second, 1, 1)
    expected = _unpacked(one.export())
    one.stop()
    other = _trainer(subject)
    other.restore(subject.folder / "saved")
    other.update(second, 1, 1)
    yield from weight_faults(expected, _unpacked(other.export()))
    other.stop()


def saves_for_transformers(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """`save_pretrained` writes a folder that transformers loads, with the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    trainer = _trainer(subject)
    trainer.save_pretrained(subject.folder / "policy")
    trainer.stop()
    model = AutoModelForCausalLM.from_pretrained(subject.folder / "policy", dtype=torch.float32)
    yield from weight_faults(weights_of(make_model()), weights_of(model))


def weight_faults(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Iterator[str]:
    """What differs between two sets of weights, bit for bit."""
    for name in sorted(expected.keys() ^ got.keys()):
        yield f"{name} is {'missing' if name in expected else 'not a parameter of the model'}"
    for name in sorted(expected.keys() & got.keys()):
        if not expected[name].equal(got[name]):
            yield f"{name} differs"


# ---- Running a trainer ----------------------------------------------------------------------------------------------


def policy_loss(inputs: LossInputs, options: Any) -> LossOutputs:
    """The loss of these rules."""
    assert inputs.advantages is not None
    old = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    return LossOutputs(losses=-(inputs.logprobs - old).exp() * inputs.advantages)


def _plain_loss(logprobs: Tensor, batch: Batch) -> Tensor:
    import torch

    scale = torch.from_numpy(batch["weights"] * batch["advantages"])
    total: Tensor = (-(logprobs - logprobs.detach()).exp() * scale).sum()
    return total


def _batch(seed: int = 0) -> Batch:
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


def _trainer(subject: Subject[TrainerSpec], *, reference: bool = False) -> Any:
    """A trainer that has begun a stage on the tiny model."""
    gpus = gpus_for(subject.spec.devices)
    trainer = subject.make(trainer_context(_model_folder(subject.folder), gpus, reference=reference))
    trainer.start()
    trainer.begin(
        TrainStage(
            name="contract",
            loss=policy_loss,
            loss_options=None,
            entropy=False,
            needs=frozenset({"advantages", "old_logprobs"}),
            optimizer_steps=4,
            options=subject.options(),
        )
    )
    return trainer


def _model_folder(folder: Path) -> Path:
    if not (folder / "model").exists():
        save_model(make_model(), folder / "model")
    return folder / "model"


def _unpacked(buckets: Any) -> dict[str, Tensor]:
    import torch

    found = {}
    for bucket in buckets:
        parts = torch.split(bucket.flat, [int(np.prod(shape)) for shape in bucket.shapes])
        for name, part, shape in zip(bucket.names, parts, bucket.shapes, strict=True):
            found[name] = part.detach().cpu().clone().view(shape)
    return found


RULES = (
    gives_the_logprobs_of_the_model,
    has_the_gradient_of_the_objective,
    learns,
    keeps_the_reference,
    exports_what_its_layout_says,
    continues_exactly_from_a_checkpoint,
    saves_for_transformers,
)
