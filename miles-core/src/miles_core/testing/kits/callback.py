"""Rules of a callback: it hears made-up runs in each role that it is built in, one without metrics, one that fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from miles_core.lifecycle import lifecycle
from miles_core.roles import EngineContext, TrainerContext
from miles_core.specs import CallbackSpec
from miles_core.testing.fakes import make_batch, make_run
from miles_core.testing.subject import Subject, skip

if TYPE_CHECKING:
    from torch import nn


def hears_a_run_in_the_driver(subject: Subject[CallbackSpec]) -> Iterator[str]:
    """Steps and evaluations without metrics, a checkpoint, and the end are no reason to raise."""
    hooks, run = _hooks(subject, "driver"), make_run(subject.folder)
    hooks.run_start(run=run)
    for step in range(2):
        hooks.rollout_end(run=run, step=step, metrics={})
        hooks.step_end(run=run, step=step + 1, metrics={"reward": 0.5} if step else {})
        hooks.eval_end(run=run, step=step + 1, metrics={})
    hooks.checkpoint_saved(run=run, step=2, path=subject.folder)
    hooks.run_end(run=run)
    yield from ()


def survives_a_run_that_fails(subject: Subject[CallbackSpec]) -> Iterator[str]:
    """A run that fails before its first step, and one that fails in the middle, are no reason to raise."""
    for steps in (0, 1):
        hooks, run = _hooks(subject, "driver"), make_run(subject.folder)
        if steps:
            hooks.run_start(run=run)
            hooks.rollout_end(run=run, step=0, metrics={})
        hooks.run_failed(run=run, error=RuntimeError("the engine died"))
        hooks.run_end(run=run)
    yield from ()


def hears_a_run_in_a_trainer(subject: Subject[CallbackSpec]) -> Iterator[str]:
    """Two optimizer steps of a small model go through, and what it adds to the metrics is finite."""
    import math

    import torch

    hooks, context = _hooks(subject, "trainer"), _trainer_context(subject)
    model = _network()
    hooks.model_built(context=context, model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = make_batch()
    for step in range(2):
        hooks.before_logprobs(context=context, step=step, model=model)
        hooks.before_train_step(context=context, step=step, model=model, optimizer=optimizer, batch=batch)
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics: dict[str, float] = {"loss": 1.0} if step else {}
        hooks.after_train_step(context=context, step=step, model=model, optimizer=optimizer, metrics=metrics)
        yield from (f"the metric {name} is {value!r}" for name, value in metrics.items() if not math.isfinite(value))
        hooks.weights_published(context=context, version=step + 1)
    model(torch.full((1, 3), math.nan)).sum().backward()
    skips = hooks.step_not_finite(context=context, step=2, model=model, optimizer=optimizer, fault="a sample is not")
    if skips not in (True, False, None):
        yield f"step_not_finite gives {skips!r}"


def hears_a_run_beside_an_engine(subject: Subject[CallbackSpec]) -> Iterator[str]:
    """The engine's start and new weights are no reason to raise."""
    hooks = _hooks(subject, "rollout")
    context = EngineContext(
        model=subject.folder,
        index=0,
        gpus=0,
        threads=1,
        dtype="float32",
        max_tokens=64,
        seed=0,
        folder=subject.folder,
    )
    hooks.engine_started(context=context)
    for version in range(2):
        hooks.weights_received(context=context, version=version)
    yield from ()


def _hooks(subject: Subject[CallbackSpec], role: Any) -> Any:
    """A new object, as each run has one."""
    if role not in subject.spec.runs_on:
        skip(f"it does not run on {role}")
    return lifecycle(role, [subject.make()])


def _trainer_context(subject: Subject[CallbackSpec]) -> TrainerContext:
    return TrainerContext(
        model=subject.folder,
        rank=0,
        world_size=1,
        address="tcp://127.0.0.1:1",
        gpus=0,
        threads=1,
        seed=0,
        reference=False,
        timeout_s=60,
    )


def _network() -> nn.Module:
    from torch import nn

    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


RULES = (
    hears_a_run_in_the_driver,
    survives_a_run_that_fails,
    hears_a_run_in_a_trainer,
    hears_a_run_beside_an_engine,
)
