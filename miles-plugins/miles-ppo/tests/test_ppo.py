"""GAE and the critic's loss against plain references."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import miles_ppo
from miles_core.config.schema import Component
from miles_core.errors import RunError
from miles_core.roles import AdvantageInputs, CriticInputs, Segments
from miles_core.run.advantages import apply_advantage
from miles_core.sample import Batch
from miles_core.specs import AdvantageSpec
from miles_core.testing.fakes import make_batch
from miles_ppo.advantage import gae
from miles_ppo.loss import critic
from miles_ppo.options import GAE, Critic

torch.set_num_threads(1)
masks = st.lists(st.booleans(), min_size=0, max_size=7).map(lambda mask: [False, *mask])


def packed(rows) -> AdvantageInputs:
    """Inputs of (reward, mask) rows, with random columns."""
    total = sum(len(mask) for _, mask in rows)
    generator = np.random.default_rng(0)
    return AdvantageInputs(
        rewards=np.array([reward for reward, _ in rows], np.float64),
        reward_parts={},
        groups=np.arange(len(rows)),
        segment_ids=np.repeat(np.arange(len(rows)), [len(mask) for _, mask in rows]),
        mask=np.concatenate([np.array(mask, bool) for _, mask in rows]),
        columns={name: generator.normal(size=total) for name in ("values", "old_logprobs", "ref_logprobs")},
    )


def one_sample(reward, mask, values, kl, options):
    """Advantages of one sample's tokens (None where masked), straight from the definition of the sum."""
    trained = [t for t, m in enumerate(mask) if m]
    if not trained:
        return [None] * len(mask)
    steps = trained if options.between_turns == "skip" else list(range(trained[0], trained[-1] + 1))
    value = [values[t] if mask[t] else 0.0 for t in steps] + [0.0]
    rewards = [(-options.kl_coef * kl[t] if mask[t] else 0.0) + (reward if t == trained[-1] else 0.0) for t in steps]
    deltas = [rewards[k] + options.gamma * value[k + 1] - value[k] for k in range(len(steps))]
    decay = options.gamma * options.lam
    sums = [sum(decay**j * deltas[k + j] for j in range(len(deltas) - k)) for k in range(len(deltas))]
    found = dict(zip(steps, sums, strict=True))
    return [found[t] if m else None for t, m in enumerate(mask)]


@given(
    rows=st.lists(st.tuples(st.floats(-2, 2), masks), min_size=1, max_size=6),
    gamma=st.sampled_from([0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    between_turns=st.sampled_from(["skip", "discount"]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    whiten=st.booleans(),
)
def test_gae(rows, gamma, lam, between_turns, kl_coef, whiten):
    options = GAE(gamma=gamma, lam=lam, between_turns=between_turns, kl_coef=kl_coef, whiten=whiten)
    inputs = packed(rows)
    columns = inputs.columns
    expected, start = [], 0
    for reward, mask in rows:
        stop = start + len(mask)
        kl = (columns["old_logprobs"] - columns["ref_logprobs"])[start:stop].tolist()
        expected += one_sample(reward, mask, columns["values"][start:stop].tolist(), kl, options)
        start = stop
    got = gae(inputs, options)
    trained = [value for value in expected if value is not None]
    returns = [value + columns["values"][t] for t, value in enumerate(expected) if value is not None]
    if whiten and len(trained) < 2:
        trained = [0.0] * len(trained)
    elif whiten:
        mean, variance = statistics.fmean(trained), statistics.variance(trained)
        trained = [(value - mean) / math.sqrt(variance + 1e-8) for value in trained]
    np.testing.assert_allclose(got["advantages"][inputs.mask], trained, atol=1e-8, rtol=1e-8)
    np.testing.assert_allclose(got["returns"][inputs.mask], returns, atol=1e-8, rtol=1e-8)
    assert not got["advantages"][~inputs.mask].any()
    assert not got["returns"][~inputs.mask].any()


@pytest.mark.parametrize("between_turns", ["skip", "discount"])
def test_what_masked_tokens_are_between_turns(between_turns):
    """Three tokens of a tool between two of the policy: worth nothing, or three steps more to the reward."""
    mask = np.array([False, True, False, False, False, True, False])
    inputs = AdvantageInputs(
        rewards=np.array([1.0]),
        reward_parts={},
        groups=np.array([0]),
        segment_ids=np.zeros(len(mask), np.int64),
        mask=mask,
        columns={"values": np.where(mask, 0.5, 99.0)},
    )
    options = GAE(gamma=0.5, lam=1.0, between_turns=between_turns, whiten=False)
    got = gae(inputs, options)["advantages"]
    steps = 1 if between_turns == "skip" else 4
    assert got[5] == 1 - 0.5
    assert got[1] == pytest.approx(0.5**steps * 1 - 0.5)


def component(**options) -> Component[AdvantageSpec]:
    (record,) = miles_ppo.miles_advantages()
    return Component(spec=record, plugin="miles-ppo", options=GAE(**options))


def valued_batch() -> Batch:
    batch = make_batch()
    values = np.random.default_rng(0).standard_normal(batch.tokens_total) * batch["mask"]
    return batch.with_columns(values=values)


def test_what_is_not_finite_is_named_before_it_spreads():
    batch = valued_batch()
    values = batch["values"].copy()
    row = int(np.flatnonzero(batch["mask"])[4])
    values[row] = np.nan
    with pytest.raises(RunError, match=rf"values is nan at token {row - batch.cu_seqlens[batch.segment_ids[row]]} of"):
        apply_advantage(batch.with_columns(values=values), component())
    rewards = batch.samples["reward"].copy()
    rewards[2] = np.inf
    with pytest.raises(RunError, match="sample 0/2 has reward inf"):
        apply_advantage(batch.with_samples(reward=rewards), component())


@pytest.mark.parametrize("between_turns", ["skip", "discount"])
def test_a_batch_without_a_trained_token_or_a_scored_sample_gives_zeros(between_turns):
    batch = valued_batch()
    masked = batch.with_columns(mask=np.zeros(batch.tokens_total, bool))
    unscored = batch.with_samples(scored=np.zeros(len(batch), bool))
    for empty in (masked, unscored):
        got = apply_advantage(empty, component(between_turns=between_turns))
        assert not got["advantages"].any()
        assert not got["returns"].any()


@pytest.mark.parametrize("samples", [1, 1000])
def test_gae_takes_time_linear_in_tokens(samples):
    """A million tokens, in one sample or in many, which a quadratic form would not survive."""
    total = 1_000_000
    mask = np.arange(total) % (total // samples) > 0
    inputs = AdvantageInputs(
        rewards=np.arange(samples, dtype=np.float64),
        reward_parts={},
        groups=np.arange(samples),
        segment_ids=np.repeat(np.arange(samples), total // samples),
        mask=mask,
        columns={"values": np.zeros(total)},
    )
    got = gae(inputs, GAE(gamma=1.0, lam=1.0, whiten=False))["advantages"]
    np.testing.assert_allclose(got[mask], inputs.rewards[inputs.segment_ids][mask])


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(8, generator=generator, dtype=torch.float64)

    return CriticInputs(
        values=normal().requires_grad_(),
        returns=normal(),
        old_values=normal(),
        segments=Segments(ids=torch.tensor([0] * 3 + [1] * 5), count=2),
    )


@pytest.mark.parametrize("value_clip", [None, 0.3])
def test_critic_values_and_gradients(inputs, value_clip):
    outputs = critic(inputs, Critic(value_clip=value_clip))
    expected = []
    for v, w, r in zip(inputs.values, inputs.old_values, inputs.returns, strict=True):
        losses = [(v - r) ** 2 / 2]
        if value_clip is not None:
            losses.append((min(max(v, w - value_clip), w + value_clip) - r) ** 2 / 2)
        expected.append(max(losses))
    wanted = torch.stack(expected)
    torch.testing.assert_close(outputs.losses, wanted)
    got = torch.autograd.grad(outputs.losses.sum(), inputs.values)
    torch.testing.assert_close(got, torch.autograd.grad(wanted.sum(), inputs.values))
    assert ("value_clip" in outputs.metrics) == (value_clip is not None)


def test_the_critics_gradient_is_that_of_its_loss(inputs):
    """By finite differences; no value stands at a kink."""

    def losses(values):
        return critic(replace(inputs, values=values), Critic(value_clip=0.3)).losses

    assert torch.autograd.gradcheck(losses, inputs.values)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GAE(lam=1.1), r"lam must be in \[0, 1\]"),
        (lambda: GAE(kl_coef=-1), "kl_coef must not be negative"),
        (lambda: GAE(eps=0), "eps must be positive"),
        (lambda: Critic(value_clip=0), "value_clip must be positive"),
    ],
)
def test_options_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("hook", ["miles_advantages", "miles_losses"])
def test_records_resolve(hook):
    for record in getattr(miles_ppo, hook)():
        assert callable(resolve_name(record.ref))
        resolve_name(record.options)()


def test_the_module_and_its_options_import_nothing_heavy():
    code = "import miles_ppo, miles_ppo.options, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "ray", "transformers"} & set(done.stdout.split())
