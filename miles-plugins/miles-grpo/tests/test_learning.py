"""Every loss, advantage and correction teaches a policy, through core's packing, aggregation and objective.

The policy is a table of logits: two prompts, three tokens each, out of four letters. A sample's reward is the share of
its tokens that are the prompt's own letter; the samples of another, older policy are what corrections are for.
"""

from __future__ import annotations

from pkgutil import resolve_name

import numpy as np
import pytest
import torch

import miles_grpo
from miles_core.config.schema import Component, LossSection
from miles_core.config.traits import needed_columns
from miles_core.roles import LossInputs, Segments
from miles_core.run.advantages import apply_advantage
from miles_core.run.objective import Objective
from miles_core.run.weights import aggregate
from miles_core.sample import Batch, Sample

PROMPTS, LENGTH, LETTERS, SAMPLES = 2, 3, 4, 8
STEPS, UPDATES = 30, 2

ADVANTAGES = {record.name: record for record in miles_grpo.miles_advantages()}
LOSSES = {record.name: record for record in miles_grpo.miles_losses()}
CORRECTIONS = {record.name: record for record in miles_grpo.miles_corrections()}


def component(spec, **options):
    made = resolve_name(spec.options)(**options) if spec.options else None
    return Component(spec=spec, plugin="miles-grpo", options=made)


def sampled(policy, generator, baseline):
    """Samples of every prompt; with a baseline, the last one of each is greedy."""
    samples = []
    for prompt in range(PROMPTS):
        drawn = torch.multinomial(policy[prompt].exp(), SAMPLES, replacement=True, generator=generator).T
        if baseline:
            drawn[-1] = policy[prompt].argmax(-1)
        for index, tokens in enumerate(drawn):
            is_baseline = baseline and index == SAMPLES - 1
            reward = float((tokens == prompt).double().mean())
            sample = Sample(
                group=prompt,
                index=index,
                prompt=np.array([0], np.int32),
                response=tokens.numpy().astype(np.int32),
                mask=np.full(LENGTH, not is_baseline),
                logprobs=policy[prompt].gather(-1, tokens[:, None])[:, 0].numpy().astype(np.float32),
                versions=np.zeros(LENGTH, np.int32),
                status="completed",
                text="",
                reward=reward,
                rewards={"letters": reward},
                baseline=is_baseline,
            )
            samples.append(sample)
    return samples


def token_logprobs(policy, batch):
    """[T] of the trained tokens."""
    rows = np.flatnonzero(batch["mask"])
    sample = batch.segment_ids[rows]
    places = rows - batch.cu_seqlens[sample] - 1
    prompts = torch.from_numpy(batch.samples["group"][sample])
    return policy[prompts, torch.from_numpy(places), torch.from_numpy(batch["tokens"][rows].astype(np.int64))]


def inputs_of(batch, logprobs, old, entropy):
    mask = batch["mask"]
    ids = np.unique(batch.segment_ids[mask], return_inverse=True)[1]
    return LossInputs(
        logprobs=logprobs,
        segments=Segments(ids=torch.from_numpy(ids), count=int(ids.max()) + 1),
        advantages=torch.from_numpy(batch["advantages"][mask]),
        old_logprobs=old,
        rollout_logprobs=torch.from_numpy(batch["rollout_logprobs"][mask]).double(),
        ref_logprobs=torch.full_like(old, -np.log(LETTERS)),
        entropy=entropy,
    )


def learnt(loss, advantage, corrections=(), aggregation="token"):
    """The expected reward before and after training."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(PROMPTS, LENGTH, LETTERS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    objective = Objective(
        loss=resolved(loss), corrections=tuple((one.spec.name, resolved(one), one.options) for one in corrections)
    )
    for _ in range(STEPS):
        old_policy = logits.detach().log_softmax(-1)
        stale = (0.9 * logits.detach()).log_softmax(-1) if corrections else old_policy
        batch = Batch.pack(sampled(stale, generator, advantage.spec.baseline))
        old = token_logprobs(old_policy, batch)
        columns = {"old_logprobs": np.zeros(batch.tokens_total), "ref_logprobs": np.zeros(batch.tokens_total)}
        columns["old_logprobs"][batch["mask"]] = old.numpy()
        columns["ref_logprobs"][batch["mask"]] = -np.log(LETTERS)
        batch = apply_advantage(batch.with_columns(**columns), advantage)
        batch = aggregate(batch, LossSection(name=loss.spec.name, aggregation=aggregation), 1)
        weights = torch.from_numpy(batch["weights"][batch["mask"]])
        for _ in range(UPDATES):
            policy = logits.log_softmax(-1)
            entropy = -(policy.exp() * policy).sum() / (PROMPTS * LENGTH) * torch.ones_like(old)
            outputs = objective(inputs_of(batch, token_logprobs(policy, batch), old, entropy), loss.options)
            optimizer.zero_grad()
            (weights * outputs.losses).sum().backward()
            optimizer.step()
    probabilities = logits.detach().softmax(-1)
    return float(torch.stack([probabilities[prompt, :, prompt].mean() for prompt in range(PROMPTS)]).mean())


def resolved(one):
    return resolve_name(one.spec.ref)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_teaches(name):
    wide = {"clip_low": 0.2, "clip_high": 0.2} if name.startswith("gspo") else {}
    loss = component(LOSSES[name], kl_coef=0.001, entropy_coef=0.001, **wide)
    assert needed_columns(loss) <= {"advantages", "old_logprobs", "ref_logprobs"}
    aggregation = "sequence" if name.startswith(("gspo", "geo")) else "token"
    assert learnt(loss, component(ADVANTAGES["grpo"]), aggregation=aggregation) > 0.6


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_advantage_teaches(name):
    options = {"kl_coef": 0.001} if "kl_coef" in ADVANTAGES[name].needs_if.values() else {}
    assert learnt(component(LOSSES["grpo"]), component(ADVANTAGES[name], **options)) > 0.6


@pytest.mark.parametrize("name", CORRECTIONS)
def test_every_correction_lets_an_older_policys_samples_teach(name):
    assert learnt(component(LOSSES["grpo"]), component(ADVANTAGES["grpo"]), [component(CORRECTIONS[name])]) > 0.6


@pytest.mark.parametrize("aggregation", ["sequence", "sequence-sum", "group"])
def test_every_aggregation_teaches(aggregation):
    loss, advantage = component(LOSSES["reinforce"]), component(ADVANTAGES["rloo"])
    assert learnt(loss, advantage, aggregation=aggregation) > 0.6
