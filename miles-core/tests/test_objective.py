from __future__ import annotations

import math
import pickle
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from miles_core import CorrectionSpec, LossSpec
from miles_core.config.schema import Component, LossSection, Schedule, StageCritic
from miles_core.roles import CorrectionOutputs, LossInputs, LossOutputs, Segments, TrainStage
from miles_core.run.objective import Objective, critic_stage, train_stage


def loss(inputs, options):
    return LossOutputs(
        losses=-options * inputs.logprobs,
        penalties=0.5 * inputs.logprobs.square(),
        metrics={"ratio": inputs.logprobs.detach()},
    )


def plain(inputs, options):
    return LossOutputs(losses=-inputs.logprobs)


def ratio(inputs, options):
    assert not inputs.logprobs.requires_grad
    return CorrectionOutputs(weights=(inputs.old_logprobs - inputs.rollout_logprobs).exp())


def halve(inputs, options):
    weights = torch.full_like(inputs.logprobs, options)
    return CorrectionOutputs(weights=weights, metrics={"share": weights > 0})


def inputs() -> LossInputs:
    return LossInputs(
        logprobs=torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True),
        old_logprobs=torch.tensor([-1.5, -2.0, -1.0], dtype=torch.float64),
        rollout_logprobs=torch.tensor([-1.0, -2.5, -1.0], dtype=torch.float64),
        segments=Segments(ids=torch.tensor([0, 0, 1]), count=2),
    )


def test_corrections_multiply_the_loss_and_leave_penalties_alone():
    given = inputs()
    objective = Objective(loss=loss, corrections=(("ratio", ratio, None), ("halve", halve, 0.5)))
    outputs = objective(given, 3.0)
    weights = torch.tensor([-0.5, 0.5, 0.0], dtype=torch.float64).exp() * 0.5
    expected = -3 * given.logprobs * weights + 0.5 * given.logprobs.square()
    torch.testing.assert_close(outputs.losses, expected)
    (gradient,) = torch.autograd.grad(outputs.losses.sum(), given.logprobs)
    torch.testing.assert_close(gradient, -3 * weights + given.logprobs.detach())
    assert outputs.penalties is None
    names = {"ratio/weight", "ratio/weight_squared", "halve/weight", "halve/weight_squared", "halve/share"}
    assert set(outputs.metrics) == {"ratio", *names}
    torch.testing.assert_close(outputs.metrics["ratio/weight_squared"], (2 * weights).square())


def test_a_loss_without_corrections_and_penalties_is_itself():
    given = inputs()
    torch.testing.assert_close(Objective(loss=plain)(given, None).losses, -given.logprobs)


def test_an_objective_crosses_processes():
    functions: tuple[Any, Any] = (torch.nn.functional.relu, torch.exp)
    objective = Objective(loss=functions[0], corrections=(("a", functions[1], 1),))
    assert pickle.loads(pickle.dumps(objective)) == objective


# A correction is given both policies' log-probabilities, whatever its record says it needs beside them.
@pytest.mark.parametrize("needs", [{"old_logprobs", "rollout_logprobs"}, {"advantages"}, set()])
def test_a_stage_knows_what_its_loss_and_corrections_read(needs, monkeypatch):
    module = ModuleType("fake_losses")
    vars(module).update(loss=loss, ratio=ratio)
    monkeypatch.setitem(sys.modules, "fake_losses", module)
    options = SimpleNamespace(kl_coef=0.1, entropy_coef=0.0)
    loss_spec = LossSpec(
        name="fake",
        ref="fake_losses:loss",
        summary="x",
        needs=frozenset({"advantages"}),
        needs_if={"ref_logprobs": "kl_coef", "staleness": "entropy_coef"},
        entropy_if="entropy_coef",
    )
    correction = CorrectionSpec(name="ratio", ref="fake_losses:ratio", summary="x", needs=frozenset(needs))
    stage: Any = SimpleNamespace(
        name="train",
        loss=Component(spec=loss_spec, plugin="p", options=options),
        corrections=(Component(spec=correction, plugin="p", options=3),),
        loss_section=LossSection(name="fake"),
        schedule=Schedule(steps=5, prompts_per_step=4, minibatches=2),
        warmup_steps=0,
        trainer=SimpleNamespace(options="trainer options"),
    )
    got = train_stage(stage)
    assert got.loss == Objective(loss=loss, corrections=(("ratio", ratio, 3),))
    assert got.needs == {"advantages", "ref_logprobs", "old_logprobs", "rollout_logprobs"}
    assert (got.loss_options, got.entropy, got.optimizer_steps, got.options) == (options, False, 10, "trainer options")


def test_a_critic_has_a_stage_of_its_own_and_leaves_the_policy_the_steps_after_its_warm_up(monkeypatch):
    module = ModuleType("fake_losses")
    vars(module).update(loss=loss, plain=plain)
    monkeypatch.setitem(sys.modules, "fake_losses", module)
    policy = LossSpec(name="fake", ref="fake_losses:loss", summary="x")
    value = LossSpec(name="value", ref="fake_losses:plain", trains="critic", needs=frozenset({"returns"}), summary="x")
    critic = StageCritic(
        trainer=Component(spec=policy, plugin="p", options="critic options"),
        loss=Component(spec=value, plugin="p", options=4),
        warmup_steps=3,
    )
    stage: Any = SimpleNamespace(
        name="train",
        loss=Component(spec=policy, plugin="p"),
        corrections=(),
        loss_section=LossSection(name="fake"),
        schedule=Schedule(steps=5, prompts_per_step=4, minibatches=2, updates_per_batch=3),
        warmup_steps=3,
        critic=critic,
        trainer=SimpleNamespace(options="trainer options"),
    )
    assert train_stage(stage).optimizer_steps == 2 * 6
    assert critic_stage(stage) == TrainStage(
        name="train",
        loss=plain,
        loss_options=4,
        entropy=False,
        needs=frozenset({"returns"}),
        optimizer_steps=5 * 6,
        options="critic options",
    )


def ratio_of(inputs, options):
    return LossOutputs(losses=(inputs.logprobs - inputs.old_logprobs).exp())


@pytest.mark.parametrize("old_policy", ["recompute", "rollout", "interpolate"])
def test_the_old_policy_is_what_the_run_file_says(old_policy):
    given = replace(inputs(), staleness=torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
    outputs = Objective(loss=ratio_of, old_policy=old_policy)(given, None)
    expected = []
    columns = (given.logprobs.tolist(), given.old_logprobs.tolist(), given.rollout_logprobs.tolist(), [0, 1, 3])
    for now, before, rollout, versions in zip(*columns, strict=True):
        share = versions / (versions + 1)
        old = {"recompute": before, "rollout": rollout, "interpolate": (1 - share) * rollout + share * now}[old_policy]
        expected.append(math.exp(now - old))
    assert outputs.losses.tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(outputs.losses.sum(), given.logprobs)
    torch.testing.assert_close(gradient, outputs.losses.detach())
