"""The hook specifications: the contract between Miles and its plugins, and nothing else.

Two families in two plugin managers. Plugin *modules* implement `DeclarationHooks` ("what do you offer?"): called once
a process, at discovery, and they import nothing heavy. *Objects built for one run* (callbacks) implement
`DriverHooks`, `TrainerHooks` or `RolloutHooks` ("what just happened?"): called a few times a step, in the order of the
run file's `callbacks`. A module that implements a lifecycle hook is refused, so installing a package can never change
a run's numbers.

A hook, or an argument of one, that will go is marked with pluggy's `warn_on_impl` or `warn_on_impl_args`: a
`DeprecationWarning` whose text names it, says what to implement instead, and with which release it goes. `miles plugins
list` and `miles plugins check` show that text of every plugin that it concerns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from miles_core import specs
    from miles_core.roles import EngineContext, RunInfo, TrainerContext
    from miles_core.sample import Batch

hookspec = pluggy.HookspecMarker("miles")
hookimpl = pluggy.HookimplMarker("miles")


class DeclarationHooks:
    """What a plugin offers. Each returns records that name implementations without importing them."""

    @hookspec
    def miles_rollouts(self) -> Iterable[specs.RolloutSpec]:
        """Rollouts: how a prompt becomes samples. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_engines(self) -> Iterable[specs.EngineSpec]:
        """Engines: what generates tokens. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_trainers(self) -> Iterable[specs.TrainerSpec]:
        """Trainers: what updates the policy. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_weight_syncs(self) -> Iterable[specs.WeightSyncSpec]:
        """Weight syncs: how weights go from a trainer to an engine. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_rewards(self) -> Iterable[specs.RewardSpec]:
        """Rewards: what scores samples. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_filters(self) -> Iterable[specs.FilterSpec]:
        """Filters: which scored groups are worth training on. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_advantages(self) -> Iterable[specs.AdvantageSpec]:
        """Advantages: what rewards say about each token. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_losses(self) -> Iterable[specs.LossSpec]:
        """Losses: the per-token objective. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_corrections(self) -> Iterable[specs.CorrectionSpec]:
        """Corrections: how much a token counts that another policy wrote. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_data_sources(self) -> Iterable[specs.DataSourceSpec]:
        """Data sources: where prompts come from. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_models(self) -> Iterable[specs.ModelSpec]:
        """Model families: which architectures are known, and how. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_trackers(self) -> Iterable[specs.TrackerSpec]:
        """Trackers: where metrics go. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_callbacks(self) -> Iterable[specs.CallbackSpec]:
        """Callbacks: objects that implement lifecycle hooks when the run file names them. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_recipes(self) -> Iterable[specs.RecipeSpec]:
        """Recipes: ready run files. Since 0.1."""
        raise AssertionError("a specification is never called")

    @hookspec
    def miles_commands(self) -> Iterable[specs.CommandSpec]:
        """Commands: further commands of `miles`. Since 0.1."""
        raise AssertionError("a specification is never called")


class DriverHooks:
    """Heard in the driver, the process of `miles train`."""

    @hookspec
    def run_start(self, run: RunInfo) -> None:
        """Everything is up and the first weights are published; no step has begun. Since 0.1."""

    @hookspec
    def rollout_end(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        """A batch is complete: generated, scored and filtered. Since 0.1."""

    @hookspec
    def step_end(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        """A step is over: the weights of version `step` are published. Since 0.1."""

    @hookspec
    def eval_end(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation of the weights of version `step` is over. Since 0.1."""

    @hookspec
    def checkpoint_saved(self, run: RunInfo, step: int, path: Path) -> None:
        """A checkpoint is complete under its final name. Since 0.1."""

    @hookspec
    def run_failed(self, run: RunInfo, error: BaseException) -> None:
        """The run stops by `error`, which an observer can neither suppress nor replace. Since 0.1."""

    @hookspec
    def run_end(self, run: RunInfo) -> None:
        """The run is over: finished, failed or interrupted. Since 0.1."""


class TrainerHooks:
    """Heard on every trainer rank, with the live model and optimizer."""

    @hookspec
    def model_built(self, context: TrainerContext, model: Any) -> None:
        """The model exists, with its weights loaded, before it is sharded or gets an optimizer. Since 0.1."""

    @hookspec
    def before_logprobs(self, context: TrainerContext, step: int, model: Any) -> None:
        """Log-probabilities are about to be computed without gradient. Since 0.1."""

    @hookspec
    def before_train_step(self, context: TrainerContext, step: int, model: Any, optimizer: Any, batch: Batch) -> None:
        """The forward and backward passes of an optimizer step on `batch` are about to begin. Since 0.1."""

    @hookspec(firstresult=True)
    def step_not_finite(
        self, context: TrainerContext, step: int, model: Any, optimizer: Any, fault: str
    ) -> bool | None:
        """The loss or the gradient norm of an optimizer step is not finite; its gradients are still there. `fault` says
        of which sample, the same on every rank. True skips the step, False stops the run, None leaves it to the next
        callback; the run stops if nobody decides. Every rank has to decide alike. Since 0.1."""

    @hookspec
    def after_train_step(
        self, context: TrainerContext, step: int, model: Any, optimizer: Any, metrics: dict[str, float]
    ) -> None:
        """The optimizer has stepped, or its step was skipped (`metrics` has `skipped_steps`); what is put into
        `metrics` is reported with the step's. Since 0.1."""

    @hookspec
    def weights_published(self, context: TrainerContext, version: int) -> None:
        """All engines have the weights of `version`. Since 0.1."""


class RolloutHooks:
    """Heard beside every engine."""

    @hookspec
    def engine_started(self, context: EngineContext) -> None:
        """The engine is up; it has no published weights yet. Since 0.1."""

    @hookspec
    def weights_received(self, context: EngineContext, version: int) -> None:
        """The engine generates with the weights of `version` from now on. Since 0.1."""
