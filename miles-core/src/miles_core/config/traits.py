"""What the components of a run read, give and need, by the traits of their records and never by their names."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, Literal

from miles_core.config.schema import Component, Stage
from miles_core.specs import AdvantageSpec, CorrectionSpec, LossSpec, TrainerSpec

Reader = Component[LossSpec] | Component[CorrectionSpec] | Component[AdvantageSpec]
"""What reads token columns."""

ALWAYS = frozenset({"tokens", "mask", "rollout_logprobs", "versions", "weights"})
"""Token columns that every batch has."""

TEACHER = frozenset({"teacher_logprobs", "teacher_top_tokens", "teacher_top_logprobs"})
"""Token columns that a teacher gives."""


def needed_columns(component: Reader) -> frozenset[str]:
    """The token columns that a component reads with the options it has."""
    spec = component.spec
    return spec.needs | {column for column, option in spec.needs_if.items() if _option(component, option)}


def _option(component: Component[Any], name: str) -> Any:
    """The value of an option by its name, which may be dotted."""
    return operator.attrgetter(name)(component.options)


_IN_PLACE_OF_OLD = {
    "recompute": frozenset({"old_logprobs"}),
    "rollout": frozenset({"rollout_logprobs"}),
    "interpolate": frozenset({"rollout_logprobs", "staleness"}),
}
"""What a loss's old log-probabilities are made of, by loss.old_policy."""


def loss_columns(stage: Stage) -> frozenset[str]:
    """The token columns that a stage's loss and its corrections read."""
    readers: list[Reader] = [stage.loss, *stage.corrections]
    read: frozenset[str] = frozenset().union(*map(needed_columns, readers))
    if "old_logprobs" in read:
        read = read - {"old_logprobs"} | _IN_PLACE_OF_OLD[stage.loss_section.old_policy]
    return read


def stage_columns(stage: Stage) -> frozenset[str]:
    """The token columns that anything in a stage reads."""
    return loss_columns(stage) | (needed_columns(stage.advantage) if stage.advantage is not None else frozenset())


def reads_advantage(readers: Iterable[Reader], trainer: Component[TrainerSpec]) -> bool:
    """Whether a loss and its corrections need more than a batch has without an advantage."""
    return not frozenset().union(*map(needed_columns, readers)) <= ALWAYS | TEACHER | trainer.spec.gives


def reads_rewards(advantage: Component[AdvantageSpec]) -> bool:
    """Whether an advantage reads rewards with the options it has."""
    option = advantage.spec.rewards_if
    return option is None or bool(_option(advantage, option))


def reads_entropy(loss: Component[LossSpec]) -> bool:
    """Whether a loss reads `LossInputs.entropy` with the options it has."""
    option = loss.spec.entropy_if
    return option is not None and bool(_option(loss, option))


def top_k(stage: Stage) -> int:
    """How many of the teacher's likeliest tokens the stage's loss reads; 0 if it reads none."""
    option = stage.loss.spec.top_k
    return 0 if option is None else int(_option(stage.loss, option))


def reads_values(advantage: Component[AdvantageSpec]) -> bool:
    """Whether an advantage needs a critic."""
    return "values" in needed_columns(advantage)


KLWeight = tuple[Literal["advantage", "loss"], str]
"""Which of the two weighs the KL divergence to the reference, and by which option."""


def kl_weights(stage: Stage) -> list[KLWeight]:
    """What weighs the KL divergence to the reference in a stage."""
    found: list[KLWeight] = []
    if stage.advantage is not None and (option := _kl_option(stage.advantage)):
        found.append(("advantage", option))
    if option := _kl_option(stage.loss):
        found.append(("loss", option))
    return found


def _kl_option(component: Component[LossSpec] | Component[AdvantageSpec]) -> str | None:
    """The option that weighs the divergence; None if nothing does, or by 0."""
    option = component.spec.kl_coef
    return option if option is not None and _option(component, option) else None
