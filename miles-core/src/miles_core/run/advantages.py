"""Calls an advantage plugin on a batch and checks what goes in and what comes out."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping
from pkgutil import resolve_name
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles_core.config.schema import Component
from miles_core.errors import RunError
from miles_core.roles import AdvantageInputs
from miles_core.sample import Batch
from miles_core.specs import AdvantageSpec


def apply_advantage(batch: Batch, component: Component | None, columns: Collection[str] | None = None) -> Batch:
    """The batch with the columns that the advantage gives, float64 [N]; the batch as it is without a component.

    columns: the token columns to hand to it; by default what its record needs with its options. Runs in the collector.
    Raises RunError, naming the sample where there is one, for a reward that is not finite, for a plugin that raises,
    and for columns that are missing, of the wrong length, not finite, or not 0 where masked.
    """
    if component is None:
        return batch
    spec = component.spec
    assert isinstance(spec, AdvantageSpec)
    _check_rewards(batch)
    names = _needed(spec, component.options) if columns is None else columns
    inputs = AdvantageInputs(
        rewards=np.asarray(batch.samples["reward"], np.float64),
        reward_parts=batch.reward_parts,
        groups=np.asarray(batch.samples["group"], np.int64),
        segment_ids=batch.segment_ids,
        mask=batch["mask"],
        columns={name: batch[name] for name in names},
    )
    label = f"advantage {spec.name!r} of {component.plugin}"
    given = _call(spec, component.options, inputs, label)
    return batch.with_columns(**_checked(batch, given, spec, label))


def _needed(spec: AdvantageSpec, options: Any) -> frozenset[str]:
    """The token columns that the record needs with these options."""
    return spec.needs | {name for name, option in spec.needs_if.items() if getattr(options, option)}


def _call(spec: AdvantageSpec, options: Any, inputs: AdvantageInputs, label: str) -> Mapping[str, NDArray[Any]]:
    function = resolve_name(spec.ref)
    try:
        given: Mapping[str, NDArray[Any]] = function(inputs, options)
    except Exception as error:
        raise RunError(f"{label} failed: {error}", traceback.format_exc()) from error
    return given


def _check_rewards(batch: Batch) -> None:
    bad = np.flatnonzero(~np.isfinite(batch.samples["reward"]))
    if len(bad):
        value = batch.samples["reward"][bad[0]]
        raise RunError(
            f"{_sample(batch, bad[0])} has reward {value}, which is not a finite number "
            f"({len(bad)} of {len(batch)} samples are like it); rewards must return finite floats"
        )


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
    for wrong, what in ((~np.isfinite(values), "not finite"), ((values != 0) & ~batch["mask"], "not 0 where masked")):
        places = np.flatnonzero(wrong)
        if len(places):
            sample = int(batch.segment_ids[places[0]])
            token = int(places[0] - batch.cu_seqlens[sample])
            raise RunError(
                f"{label} gave {name} {values[places[0]]} at token {token} of {_sample(batch, sample)}: {what}"
            )
    return values


def _sample(batch: Batch, row: int) -> str:
    """Names a sample for people: prompt id and place among the prompt's samples."""
    return f"sample {batch.samples['group'][row]}/{batch.samples['index'][row]}"
