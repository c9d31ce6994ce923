"""The objective of a stage: a loss with its corrections, itself a `roles.Loss`.

    objective_t = loss_t * prod_c weight_c,t + penalty_t

Trainers get this instead of the bare loss, so they know nothing of corrections and penalties.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from miles_core.config.schema import Stage
from miles_core.config.traits import needed_columns
from miles_core.roles import Correction, CorrectionInputs, Loss, LossInputs, LossOutputs, TrainStage
from miles_core.specs import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """corrections: (name, correction, options), whose weights are multiplied. Their metrics are "name/metric".

    Runs on every trainer rank, once a micro-batch. Picklable where the loss and the corrections are.
    """

    loss: Loss
    corrections: tuple[tuple[str, Correction, Any], ...] = ()

    def __call__(self, inputs: LossInputs, options: Any) -> LossOutputs:
        """Per-token objectives [T] without penalties left over. options: of the loss."""
        outputs = self.loss(inputs, options)
        losses = outputs.losses
        metrics: dict[str, Tensor] = dict(outputs.metrics)
        for name, correction, its_options in self.corrections:
            corrected = correction(_correction_inputs(inputs), its_options)
            losses = losses * corrected.weights
            weights = {"weight": corrected.weights, "weight_squared": corrected.weights.square()}
            metrics |= _prefixed(name, {**corrected.metrics, **weights})
        if outputs.penalties is not None:
            losses = losses + outputs.penalties
        return LossOutputs(losses=losses, metrics=metrics)


def train_stage(stage: Stage) -> TrainStage:
    """What a trainer does in a stage. Imports the loss and its corrections, so it is for the trainer's processes."""
    spec, options = stage.loss.spec, stage.loss.options
    assert isinstance(spec, LossSpec)
    corrections = tuple((one.spec.name, resolve_name(one.spec.ref), one.options) for one in stage.corrections)
    return TrainStage(
        name=stage.name,
        loss=Objective(loss=resolve_name(spec.ref), corrections=corrections),
        loss_options=options,
        entropy=spec.entropy_if is not None and bool(getattr(options, spec.entropy_if)),
        needs=frozenset().union(*(needed_columns(one) for one in (stage.loss, *stage.corrections))),
        optimizer_steps=stage.schedule.optimizer_steps,
        options=stage.trainer.options,
    )


def _correction_inputs(inputs: LossInputs) -> CorrectionInputs:
    assert inputs.old_logprobs is not None
    assert inputs.rollout_logprobs is not None
    return CorrectionInputs(
        logprobs=inputs.logprobs.detach(),
        old_logprobs=inputs.old_logprobs,
        rollout_logprobs=inputs.rollout_logprobs,
        segments=inputs.segments,
        advantages=inputs.advantages,
    )


def _prefixed(name: str, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in metrics.items()}
