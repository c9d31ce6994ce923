"""The learning rate over a stage: Megatron's own scheduler, counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from miles_core.errors import UserError
from miles_megatron.options import TrainerOptions


def build(optimizer: Any, options: TrainerOptions, steps: int) -> OptimizerParamScheduler:
    """Of a stage of `steps` optimizer steps; the rate is constant unless `scheduler.lr_decay_style` says otherwise.

    Raises `UserError` for a schedule that Megatron refuses.
    """
    given: Mapping[str, Any] = options.scheduler
    config = optimizer.config
    decay = given.get("lr_decay_iters") or steps
    warmup = given.get("lr_warmup_iters", 0)
    if given.get("lr_warmup_fraction") is not None:
        warmup = given["lr_warmup_fraction"] * decay
    weight_decay = config.weight_decay
    try:
        return OptimizerParamScheduler(
            optimizer,
            init_lr=given.get("lr_warmup_init", 0.0),
            max_lr=config.lr,
            min_lr=config.min_lr or 0.0,
            lr_warmup_steps=warmup,
            lr_decay_steps=decay,
            lr_decay_style=given.get("lr_decay_style", "constant"),
            start_wd=_or(given.get("start_weight_decay"), weight_decay),
            end_wd=_or(given.get("end_weight_decay"), weight_decay),
            wd_incr_steps=decay,
            wd_incr_style=given.get("weight_decay_incr_style", "constant"),
            wsd_decay_steps=given.get("lr_wsd_decay_iters"),
            lr_wsd_decay_style=given.get("lr_wsd_decay_style", "exponential"),
        )
    except AssertionError as error:
        raise UserError(
            f"[trainer.scheduler]: Megatron-core refuses a schedule with {dict(given)}, lr {config.lr} and min_lr "
            f"{config.min_lr} over {steps} optimizer steps"
        ) from error


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def rate(optimizer: Any) -> float:
    """The learning rate of the next optimizer step."""
    return float(optimizer.param_groups[0]["lr"])
