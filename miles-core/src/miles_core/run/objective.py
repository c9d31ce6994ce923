"""The objective of a stage: a loss with its corrections, itself a `roles.Loss`.

    objective_t = loss_t * prod_c weight_c,t + penalty_t

Trainers get this instead of the bare loss, so they know nothing of corrections and penalties.

What the loss and the corrections take for the policy before the batch's first update, by `loss.old_policy`:

    recompute     that policy itself, by a forward pass where a batch has more than one optimizer step
    rollout       the policy that wrote the samples, as the engine says; there is then nothing between the two for a
                  correction to weigh, unless it compares with the current policy
    interpolate   log pi_old = log rollout + s / (s + 1) (log pi - log rollout), pi the current policy, held constant,
                  and s the staleness of the token. AReaL's "loglinear" (prox_logp_method), which saves the forward pass
                  where samples are stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from miles_core.config.schema import OldPolicy, Stage
from miles_core.config.traits import loss_columns, needed_columns, reads_entropy
from miles_core.roles import Correction, CorrectionInputs, Loss, LossInputs, LossOutputs, TrainStage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """corrections: (name, correction, options), whose weights are multiplied. Their metrics are "name/metric".
    old_policy: see above.

    Runs on every trainer rank, once a micro-batch. Picklable where the loss and the corrections are.
    """

    loss: Loss
    corrections: tuple[tuple[str, Correction, Any], ...] = ()
    old_policy: OldPolicy = "recompute"

    def __call__(self, inputs: LossInputs, options: Any) -> LossOutputs:
        """Per-token objectives [T] without penalties left over. options: of the loss."""
        inputs = _with_old(inputs, self.old_policy)
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
    corrections = tuple((one.spec.name, resolve_name(one.spec.ref), one.options) for one in stage.corrections)
    return TrainStage(
        name=stage.name,
        loss=Objective(loss=resolve_name(spec.ref), corrections=corrections, old_policy=stage.loss_section.old_policy),
        loss_options=options,
        entropy=reads_entropy(stage.loss),
        needs=loss_columns(stage),
        optimizer_steps=stage.schedule.optimizer_steps - stage.warmup_steps * stage.schedule.updates_of_a_batch,
        options=stage.trainer.options,
    )


def critic_stage(stage: Stage) -> TrainStage:
    """What the critic does in a stage. Imports its loss."""
    assert stage.critic is not None
    loss = stage.critic.loss
    return TrainStage(
        name=stage.name,
        loss=resolve_name(loss.spec.ref),
        loss_options=loss.options,
        entropy=False,
        needs=needed_columns(loss),
        optimizer_steps=stage.schedule.optimizer_steps,
        options=stage.critic.trainer.options,
    )


def _with_old(inputs: LossInputs, old_policy: OldPolicy) -> LossInputs:
    """The inputs with the old log-probabilities that are asked for; as they are for a loss that reads none."""
    rollout = inputs.rollout_logprobs
    if old_policy == "recompute" or rollout is None:
        return inputs
    if old_policy == "rollout":
        return replace(inputs, old_logprobs=rollout)
    assert inputs.staleness is not None
    share = inputs.staleness / (inputs.staleness + 1)
    return replace(inputs, old_logprobs=rollout + share * (inputs.logprobs.detach() - rollout))


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
