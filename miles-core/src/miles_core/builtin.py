"""What core itself offers, declared like any plugin."""

from __future__ import annotations

from collections.abc import Iterable

from miles_core.hooks import hookimpl
from miles_core.specs import DataSourceSpec, FilterSpec, RolloutSpec, TrackerSpec


@hookimpl
def miles_rollouts() -> Iterable[RolloutSpec]:
    """One completion per sample."""
    yield RolloutSpec(
        name="single-turn",
        ref="miles_core.run.rollouts:SingleTurn",
        summary="One completion per sample, straight from the prompt",
    )


@hookimpl
def miles_filters() -> Iterable[FilterSpec]:
    """Filters that any group-relative objective wants."""
    yield FilterSpec(
        name="nonzero-std",
        ref="miles_core.run.filters:NonzeroStd",
        summary="Drops prompts whose samples all have the same reward: they give no gradient",
    )
    yield FilterSpec(
        name="no-aborted",
        ref="miles_core.run.filters:NoAborted",
        summary="Drops prompts of which a sample was aborted",
    )
    yield FilterSpec(
        name="reward-range",
        ref="miles_core.run.filters:RewardRange",
        options="miles_core.run.filter_options:RewardRangeOptions",
        summary="Drops prompts that are too hard or too easy: whose mean reward lies outside of two bounds",
    )


@hookimpl
def miles_data_sources() -> Iterable[DataSourceSpec]:
    """Prompts from files."""
    yield DataSourceSpec(
        name="jsonl",
        ref="miles_core.run.data:Jsonl",
        options="miles_core.run.data_options:JsonlOptions",
        check="miles_core.run.data:check",
        example="miles_core.run.examples:jsonl",
        summary="Prompts from a file of JSON lines",
        answers=True,
    )


@hookimpl
def miles_trackers() -> Iterable[TrackerSpec]:
    """Metrics in the run folder."""
    yield TrackerSpec(
        name="jsonl",
        ref="miles_core.run.trackers:JsonLines",
        summary="Metrics as JSON lines in the run folder; every run has them",
    )
