"""Rules of the critic that a trainer's record names.

Its loss is the squared error of its values, sum over tokens of weight * (value - return)^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from miles_core.plugins import resolve
from miles_core.roles import CriticInputs, LossOutputs
from miles_core.sample import Batch
from miles_core.specs import TrainerSpec
from miles_core.testing.kits.training import TOLERANCE, training_batch, training_stage, update_around_save
from miles_core.testing.models import VOCABULARY, gpus_for, make_model, model_folder, save_model, trainer_context
from miles_core.testing.subject import Subject, skip


def knows_values_before_their_tokens(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """If it has a critic: values are finite, 0 where masked, and know neither other samples nor what comes later."""
    critic, batch = _critic(subject), training_batch()
    column = critic.values(batch, 0)
    alone = [critic.values(batch.select([sample]), 0) for sample in range(len(batch))]
    last = batch.cu_seqlens[1:] - 1  # of each sample's tokens
    tokens = batch["tokens"].copy()
    tokens[last] = (tokens[last] + 1) % VOCABULARY
    changed = critic.values(batch.with_columns(tokens=tokens), 0)
    critic.stop()
    if column is None or column.shape != (batch.tokens_total,):
        yield f"values has the shape {None if column is None else column.shape} for {batch.tokens_total} tokens"
        return
    if not np.isfinite(column).all() or not column[batch["mask"]].any():
        yield "values are not finite, or nothing but 0"
    if (column[~batch["mask"]] != 0).any():
        yield "values are not 0 where masked"
    if (apart := float(np.abs(column - np.concatenate(alone)).max())) > TOLERANCE:
        yield f"a value differs by {apart:.3g} for a sample alone"
    if (apart := float(np.abs(column - changed).max())) > TOLERANCE:
        yield f"a value differs by {apart:.3g} when a token that comes later, or its own, is another one"


def learns_values(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """If it has a critic: its loss is that of its values, and an optimizer step makes it smaller."""
    critic, batch = _critic(subject), _valued(training_batch())
    values = critic.values(batch, 0)
    expected = float((batch["weights"] * (values - batch["returns"]) ** 2).sum())
    loss = critic.update(batch, 0, 1).get("loss")
    after = critic.update(batch, 1, 1).get("loss")
    critic.stop()
    if loss is None or after is None:
        yield "update reports no loss"
    elif abs(loss - expected) > TOLERANCE * max(1.0, abs(expected)):
        yield f"loss is {loss:.6g} and not {expected:.6g}"
    elif after >= loss:
        yield f"after an optimizer step the loss is {after:.6g} and not below {loss:.6g}"


def continues_its_critic_exactly_from_a_checkpoint(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """If it has a critic: saved, restored into a new one, and trained on, it gives the same values, bit for bit."""
    first, second = _valued(training_batch(0)), _valued(training_batch(1))
    one = _critic(subject)
    update_around_save(one, first, second, subject.folder / "saved")
    expected = one.values(first, 2)
    one.stop()
    other = _critic(subject)
    other.restore(subject.folder / "saved")
    other.update(second, 1, 1)
    got = other.values(first, 2)
    other.stop()
    if not np.array_equal(expected, got):
        yield f"a value differs by {float(np.abs(expected - got).max()):.3g}"


def hands_the_policys_weights_to_its_critic(subject: Subject[TrainerSpec]) -> Iterator[str]:
    """If it has a critic: with a saved policy's weights it gives the values of one that was started from them."""
    batch = training_batch()
    save_model(make_model(seed=5), subject.folder / "policy")
    critic = _critic(subject)
    before = critic.values(batch, 0)
    critic.load_pretrained(subject.folder / "policy")
    got = critic.values(batch, 0)
    critic.stop()
    other = _critic(subject, model=subject.folder / "policy")
    expected = other.values(batch, 0)
    other.stop()
    if not np.array_equal(expected, got):
        yield f"a value differs by {float(np.abs(expected - got).max()):.3g}"
    if np.array_equal(before, got):
        yield "its values do not change with the weights"


# ---- Running a critic -----------------------------------------------------------------------------------------------


def value_loss(inputs: CriticInputs, options: Any) -> LossOutputs:
    """The critic's loss of these rules."""
    return LossOutputs(losses=(inputs.values - inputs.returns).square())


def _valued(batch: Batch) -> Batch:
    """With returns to learn, and what the values were before."""
    noise = np.random.default_rng(len(batch)).standard_normal((2, batch.tokens_total)) * batch["mask"]
    return batch.with_columns(returns=1.0 + noise[0], values=noise[1])


def _critic(subject: Subject[TrainerSpec], model: Path | None = None) -> Any:
    """A critic that has begun a stage on the tiny model, or another."""
    if subject.spec.critic is None:
        skip("it has no critic")
    context = trainer_context(model or model_folder(subject.folder), gpus_for(subject.spec.devices))
    critic = resolve(subject.spec.critic)(subject.options(), replace(context, role="critic"))
    critic.start()
    critic.begin(training_stage(subject.options(), value_loss, frozenset({"returns", "values"})))
    return critic


RULES = (
    knows_values_before_their_tokens,
    learns_values,
    continues_its_critic_exactly_from_a_checkpoint,
    hands_the_policys_weights_to_its_critic,
)
