"""Calls an advantage plugin on a batch and checks what goes in and what comes out."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping
from pkgutil import resolve_name
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles_core.config.schema import Component
from miles_core.config.traits import needed_columns
from miles_core.errors import RunError
from miles_core.roles import AdvantageInputs
from miles_core.run.checks import check_rewards, check_tokens
from miles_core.sample import Batch
from miles_core.specs import AdvantageSpec


def apply_advantage(batch: Batch, component: Component[AdvantageSpec] | None) -> Batch:
    """The batch with the columns that the advantage gives, float64 [N]; the batch as it is without a component.

    Samples that could not be scored are kept from it and get 0. Runs in the collector. Raises RunError, naming the
    sample where there is one, for a reward or a trained token's column that is not finite, for a plugin that raises,
    and for given columns that are missing, of the wrong length, not finite, or not 0 where masked.
    """
    if component is None:
        return batch
    spec = component.spec
    scored = batch.samples.get("scored", np.ones(len(batch), np.bool_))
    part = batch.select(np.flatnonzero(scored))
    check_rewards(part)
    names = needed_columns(component)
    for name in sorted(names):
        check_tokens(part, name, part[name], ~np.isfinite(part[name]) & part["mask"], "not finite")
    label = f"advantage {spec.name!r} of {component.plugin}"
    given = _call(spec, component.options, _inputs(part, names), label)
    checked = _checked(part, given, spec, label)
    return batch.with_columns(**{name: _among_all(batch, scored, column) for name, column in checked.items()})


def _inputs(batch: Batch, names: Collection[str]) -> AdvantageInputs:
    return AdvantageInputs(
        rewards=np.asarray(batch.samples["reward"], np.float64),
        reward_parts=batch.reward_parts,
        reward_weights={name: batch.reward_weights.get(name, 1.0) for name in batch.reward_parts},
        groups=np.asarray(batch.samples["group"], np.int64),
        baseline=batch.samples.get("baseline"),
        segment_ids=batch.segment_ids,
        mask=batch["mask"],
        columns={name: batch[name] for name in names},
    )


def _call(spec: AdvantageSpec, options: Any, inputs: AdvantageInputs, label: str) -> Mapping[str, NDArray[Any]]:
    function = resolve_name(spec.ref)
    try:
        given: Mapping[str, NDArray[Any]] = function(inputs, options)
    except Exception as error:
        raise RunError(f"{label} failed: {error}", traceback.format_exc()) from error
    return given


def _checked(
    batch: Batch, given: Mapping[str, NDArray[Any]], spec: AdvantageSpec, label: str
) -> dict[str, NDArray[np.float64]]:
    if set(given) != spec.gives:
        raise RunError(f"{label} gave the columns {sorted(given)}; its record says {sorted(spec.gives)}")
    return {name: _checked_column(batch, name, np.asarray(column), label) for name, column in given.items()}


def _checked_column(batch: Batch, name: str, column: NDArray[Any], label: str) -> NDArray[np.float64]:
    if column.shape != (batch.tokens_total,):
        raise RunError(f"{label} gave {name} of shape {column.shape} for {batch.tokens_total} tokens")
    values = column.astype(np.float64)
    check_tokens(batch, f"{name} of {label}", values, ~np.isfinite(values), "not finite")
    check_tokens(batch, f"{name} of {label}", values, (values != 0) & ~batch["mask"], "not 0 where masked")
    return values


def _among_all(batch: Batch, scored: NDArray[np.bool_], column: NDArray[np.float64]) -> NDArray[np.float64]:
    """A column of the scored samples' tokens -> [N], 0 for the others."""
    whole = np.zeros(batch.tokens_total)
    whole[scored[batch.segment_ids]] = column
    return whole
