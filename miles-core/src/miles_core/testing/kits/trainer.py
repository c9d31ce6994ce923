"""Rules of a trainer: it trains a tiny model, and transformers and plain PyTorch say what it must have computed.

Those of its critic, if it has one, are in `miles_core.testing.kits.critic`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from miles_core.errors import UserError
from miles_core.lifecycle import lifecycle
from miles_core.roles import LossInputs, LossOutputs
from miles_core.sample import Batch
from miles_core.specs import TrainerSpec
from miles_core.testing.kits import critic
from miles_core.testing.kits.training import (
    TOLERANCE,
    training_batch,
    training_stage,
    unpacked,
    update_around_save,
    weight_faults,
)
from miles_core.testing.models import (
    VOCABULARY,
    batch_logprobs,
    batch_top_logprobs,
    gpus_for,
    make_model,
    model_folder,
    trainer_context,
    weights_of,
)
from miles_core.testing.subject import Subject, skip

if TYPE_CHECKING:
    from torch import Tensor


def gives_the_logprobs_of_the_model(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """Log-probabilities of a packed batch are transformers' own for each sample alone, and 0 where masked."""
    import torch

    trainer, batch = _trainer(subject), training_batch()
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
    """Loss, gradient norm and each element of the gradient equal plain PyTorch's to 1e-5, however the batch is cut."""
    # In one; and with its samples turned round, each a micro-batch if the trainer has the option `micro_batch_tokens`.
    batch, model = training_batch(), make_model().double()
    objective = _plain_loss(batch_logprobs(model, batch), batch)
    objective.backward()  # type: ignore[no-untyped-call]
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    turned = batch.select(np.arange(len(batch))[::-1].copy())
    for label, part, changes in (("in one", batch, {}), ("one by one", turned, _one_by_one(subject))):
        metrics, got = _stepped(subject, part, changes)
        if got is None:
            yield "before_train_step is not told of an optimizer step"
            return
        faults = [*_metric_faults(metrics, objective, expected), *_gradient_faults(expected, got)]
        yield from (f"{label}: {fault}" for fault in faults)


def _one_by_one(subject: Subject[TrainerSpec]) -> Mapping[str, Any]:
    """Options that make each sample a micro-batch, none if the trainer has no such option."""
    try:
        subject.options(micro_batch_tokens=1)
    except UserError:
        return {}
    return {"micro_batch_tokens": 1}


def _stepped(
    subject: Subject[TrainerSpec], batch: Batch, changes: Mapping[str, Any]
) -> tuple[Mapping[str, float], Mapping[str, Tensor] | None]:
    """Metrics of an optimizer step, and by how much it lowered each weight for each unit of its learning rate; None if
    its callback was not told of it."""
    plain = _PlainDescent()
    trainer = _trainer(subject, hooks=lifecycle("trainer", [plain]), **changes)
    before = unpacked(trainer.export())
    metrics = trainer.update(batch, 0, 1)
    after = unpacked(trainer.export())
    trainer.stop()
    if plain.unknown:
        skip(f"no way is known to read a gradient from a step of {plain.unknown}")
    if not plain.told:
        return metrics, None
    return metrics, {name: (before[name].double() - after[name].double()) / _RATE for name in before}


_RATE = 1e4
"""So large that a weight after the step is nothing but its gradient: rounding to float32 takes nothing away from it."""


class _PlainDescent:
    """A callback that makes a trainer's next step one of plain gradient descent.

    An adaptive optimizer divides by the root of a mean of squares plus epsilon; beside a huge epsilon that root is
    nothing.
    """

    told = False
    unknown = ""
    """The kind of an optimizer that this is not known to work with."""

    def before_train_step(self, optimizer: Any) -> None:
        self.told = True
        for group in optimizer.param_groups:
            epsilon = group.get("eps", 1.0 if type(optimizer).__name__ == "SGD" else None)
            if not isinstance(epsilon, float):
                self.unknown = type(optimizer).__name__
                return
            group["lr"] = _RATE
            if "eps" in group:
                group.update(eps=_EPSILON, lr=_RATE * _EPSILON)
            group["weight_decay"] = 0.0


_EPSILON = 1e8


def _gradient_faults(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Iterator[str]:
    """Where a step's direction is not that of the gradient: clipping may have made it shorter, by one factor."""
    names = sorted(expected.keys() & got.keys())
    scale = _norm(expected) / max(_norm({name: got[name] for name in names}), 1e-30)
    for name in names:
        apart = (got[name] * scale - expected[name]).abs().max() / expected[name].abs().max()
        if not apart <= TOLERANCE:
            yield f"the gradient of {name} differs by {float(apart):.3g} of its largest element"


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return float(sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5)


def gives_the_logprobs_of_the_teachers_tokens(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """If its record says `top_logprobs`: a loss gets those of the teacher's likeliest tokens, with their gradient."""
    import torch

    if not subject.spec.top_logprobs:
        skip("its record does not say top_logprobs")
    rng = np.random.default_rng(5)
    batch, model = training_batch(), make_model()
    shape = (batch.tokens_total, 3)
    batch = replace(batch, temperature=0.8).with_columns(
        teacher_top_tokens=rng.integers(0, VOCABULARY, shape).astype(np.int32),
        teacher_top_logprobs=np.log(rng.random(shape) / 3).astype(np.float32),
    )
    trainer = _trainer(subject)
    trainer.begin(
        training_stage(subject.options(), top_loss, frozenset({"teacher_top_tokens", "teacher_top_logprobs"}))
    )
    metrics = trainer.update(batch, 0, 1)
    trainer.stop()
    scale = torch.from_numpy(batch["teacher_top_logprobs"] * batch["weights"][:, None])
    objective = (scale * batch_top_logprobs(model, batch)).sum()
    objective.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    yield from _metric_faults(metrics, objective, gradients)


def _metric_faults(metrics: Mapping[str, float], objective: Tensor, gradients: Mapping[str, Tensor]) -> Iterator[str]:
    """Where the metrics of a step are not those of the objective by plain PyTorch."""
    for name, expected in {"loss": float(objective.detach()), "grad_norm": _norm(gradients)}.items():
        if name not in metrics:
            yield f"update reports no {name}"
        elif abs(metrics[name] - expected) > TOLERANCE * abs(expected):
            yield f"{name} is {metrics[name]:.6g} and not {expected:.6g}"


def learns(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """An optimizer step on the same batch makes good tokens likelier and bad ones less likely."""
    trainer, batch = _trainer(subject), training_batch()
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
    trainer, batch = _trainer(subject, reference=True), training_batch()
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
    exported = unpacked(buckets)
    trainer.stop()
    if [(bucket.names, bucket.shapes) for bucket in buckets] != [(part.names, part.shapes) for part in layout]:
        yield "`export` does not yield what `layout` says"
    names = [name for bucket in buckets for name in bucket.names]
    yield from (f"{name} is exported {names.count(name)} times" for name in set(names) if names.count(name) > 1)
    yield from weight_faults(weights_of(make_model()), exported)


def continues_exactly_from_a_checkpoint(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """Saved, restored into a new trainer, and trained on: the same weights, bit for bit."""
    first, second = training_batch(0), training_batch(1)
    one = _trainer(subject)
    update_around_save(one, first, second, subject.folder / "saved")
    expected = unpacked(one.export())
    one.stop()
    other = _trainer(subject)
    other.restore(subject.folder / "saved")
    other.update(second, 1, 1)
    yield from weight_faults(expected, unpacked(other.export()))
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


# ---- Running a trainer ----------------------------------------------------------------------------------------------


def top_loss(inputs: LossInputs, options: Any) -> LossOutputs:
    """The loss of these rules on a teacher's tokens."""
    assert inputs.top_logprobs is not None
    assert inputs.teacher_top_logprobs is not None
    return LossOutputs(losses=(inputs.teacher_top_logprobs * inputs.top_logprobs).sum(-1))


def _plain_loss(logprobs: Tensor, batch: Batch) -> Tensor:
    import torch

    scale = torch.from_numpy(batch["weights"] * batch["advantages"])
    total: Tensor = (-(logprobs - logprobs.detach()).exp() * scale).sum()
    return total


def _trainer(subject: Subject[TrainerSpec], *, reference: bool = False, hooks: Any = None, **changes: Any) -> Any:
    """A trainer that has begun a stage on the tiny model, with the example's options and `changes`."""
    gpus = gpus_for(subject.spec.devices)
    context = trainer_context(model_folder(subject.folder), gpus, reference=reference, hooks=hooks)
    trainer = subject.target(subject.options(**changes), context)
    trainer.start()
    trainer.begin(training_stage(subject.options(**changes)))
    return trainer


RULES = (
    gives_the_logprobs_of_the_model,
    has_the_gradient_of_the_objective,
    gives_the_logprobs_of_the_teachers_tokens,
    learns,
    keeps_the_reference,
    exports_what_its_layout_says,
    continues_exactly_from_a_checkpoint,
    saves_for_transformers,
    *critic.RULES,
)
