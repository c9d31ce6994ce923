"""Bad input through every advantage, loss and correction of core's pipeline: a named error, or a neutral result."""

from __future__ import annotations

from dataclasses import replace
from pkgutil import resolve_name

import numpy as np
import pytest
import torch

import miles_grpo
from miles_core.config.schema import Component, LossSection
from miles_core.errors import RunError
from miles_core.roles import CorrectionInputs, LossInputs, Segments
from miles_core.run.advantages import apply_advantage
from miles_core.run.weights import aggregate
from miles_core.sample import Batch
from miles_core.testing.fakes import make_batch, make_group

ADVANTAGES = {record.name: record for record in miles_grpo.miles_advantages()}
LOSSES = {record.name: record for record in miles_grpo.miles_losses()}
CORRECTIONS = {record.name: record for record in miles_grpo.miles_corrections()}
AGGREGATIONS = ("token", "sequence", "sequence-sum", "group")


def component(record):
    """With the KL divergence in the reward, where there can be one."""
    options = resolve_name(record.options)() if record.options else None
    if "kl_coef" in getattr(record, "needs_if", {}).values():
        options = replace(options, kl_coef=0.1)
    return Component(spec=record, plugin="miles-grpo", options=options)


def full(batch: Batch) -> Batch:
    """With every column that an advantage may read, and a baseline sample in each group."""
    groups = batch.samples["group"]
    last = np.append(groups[1:] != groups[:-1], True)
    noise = np.random.default_rng(0).standard_normal((2, batch.tokens_total)) * batch["mask"]
    return batch.with_samples(baseline=last).with_columns(old_logprobs=-1 + noise[0], ref_logprobs=-1 + noise[1])


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_reward_that_is_not_finite_names_its_sample(name, reward):
    batch = full(make_batch())
    rewards = batch.samples["reward"].copy()
    rewards[5] = reward
    with pytest.raises(RunError, match=r"sample 1/1 has reward -?(nan|inf), which is not a finite number"):
        apply_advantage(batch.with_samples(reward=rewards), component(ADVANTAGES[name]))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", [name for name, record in ADVANTAGES.items() if record.needs_if])
def test_a_log_probability_that_is_not_finite_names_its_token(name, value):
    batch = full(make_batch())
    row = int(np.flatnonzero(batch["mask"])[7])
    reference = batch["ref_logprobs"].copy()
    reference[row] = value
    sample = batch.segment_ids[row]
    where = f"{batch.samples['group'][sample]}/{batch.samples['index'][sample]}"
    with pytest.raises(
        RunError, match=rf"ref_logprobs is .* at token {row - batch.cu_seqlens[sample]} of sample {where}"
    ):
        apply_advantage(batch.with_columns(ref_logprobs=reference), component(ADVANTAGES[name]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_batch_without_a_trained_token_weighs_nothing(name, aggregation):
    batch = full(make_batch())
    batch = batch.with_columns(mask=np.zeros(batch.tokens_total, np.bool_))
    batch = apply_advantage(batch, component(ADVANTAGES[name]))
    batch = aggregate(batch, LossSection(name="x", aggregation=aggregation), 2)
    assert not batch["advantages"].any()
    assert not batch["weights"].any()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_batch_of_which_no_sample_was_scored_gets_no_advantage(name):
    batch = full(make_batch())
    batch = batch.with_samples(scored=np.zeros(len(batch), np.bool_), reward=np.full(len(batch), np.nan))
    assert not apply_advantage(batch, component(ADVANTAGES[name]))["advantages"].any()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_samples_without_a_trained_token_get_nothing_and_spoil_nothing(name):
    batch = full(make_batch())
    silent = (batch.samples["index"] == 0)[batch.segment_ids]
    advantages = apply_advantage(batch.with_columns(mask=batch["mask"] & ~silent), component(ADVANTAGES[name]))
    assert np.isfinite(advantages["advantages"]).all()
    assert not advantages["advantages"][silent].any()


def tokens(count: int, **columns: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("logprobs", "advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy")
    return {name: torch.randn(count, generator=generator) - 2 for name in names} | columns


@pytest.mark.parametrize("extreme", [-1e4, -80.0, 0.0])
@pytest.mark.parametrize("which", ["logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("name", LOSSES)
def test_however_far_policies_are_apart_losses_and_gradients_are_finite(name, which, extreme):
    options = component(LOSSES[name]).options
    columns = tokens(6, **{which: torch.tensor([extreme, -1.0, extreme, -2.0, extreme, -0.5])})
    columns["logprobs"].requires_grad_()
    inputs = LossInputs(segments=Segments(ids=torch.tensor([0, 0, 0, 1, 1, 2]), count=3), **columns)
    outputs = resolve_name(LOSSES[name].ref)(inputs, options)
    total = outputs.losses.sum() if outputs.penalties is None else (outputs.losses + outputs.penalties).sum()
    (gradient,) = torch.autograd.grad(total, columns["logprobs"])
    assert torch.isfinite(total)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("extreme", [-1e4, -80.0, 0.0])
@pytest.mark.parametrize("which", ["logprobs", "old_logprobs", "rollout_logprobs"])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_however_far_policies_are_apart_corrections_are_finite(name, which, extreme):
    columns = tokens(6, **{which: torch.tensor([extreme, -1.0, extreme, -2.0, extreme, -0.5])})
    inputs = CorrectionInputs(
        segments=Segments(ids=torch.tensor([0, 0, 0, 1, 1, 2]), count=3),
        **{name: columns[name] for name in ("logprobs", "old_logprobs", "rollout_logprobs", "advantages")},
    )
    outputs = resolve_name(CORRECTIONS[name].ref)(inputs, component(CORRECTIONS[name]).options)
    assert torch.isfinite(outputs.weights).all()
    assert (outputs.weights >= 0).all()
    assert all(torch.isfinite(metric.float()).all() for metric in outputs.metrics.values())


@pytest.mark.parametrize("name", sorted(set(tokens(1)) - {"logprobs"}))
def test_columns_of_other_lengths_are_refused_by_name(name):
    """One entry too, which torch would spread over all tokens."""
    for wrong in (1, 2, 4):
        with pytest.raises(ValueError, match=f"^{name} has {wrong} entries for 3 trained tokens$"):
            LossInputs(
                segments=Segments(ids=torch.tensor([0, 0, 0]), count=1), **tokens(3, **{name: torch.zeros(wrong)})
            )


def test_a_sample_whose_columns_differ_in_length_is_named():
    (sample,) = make_group([1.0], group=7)
    with pytest.raises(ValueError, match="sample 7/0: response, mask, logprobs and versions disagree in length"):
        replace(sample, logprobs=sample.logprobs[:-1])
