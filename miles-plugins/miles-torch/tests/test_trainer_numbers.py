"""The trainer's numbers against transformers and a few lines of plain torch."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from trainer_kit import alone, exported, make_batch, make_trainer, norm, plain_model, plain_objective, tiny_model

from miles_core.errors import RunError, UserError
from miles_core.roles import LossOutputs
from miles_torch import logprobs as logprobs_module
from miles_torch import model as model_module
from miles_torch import optimizer
from miles_torch.logprobs import token_logprobs
from miles_torch.options import OptimizerOptions
from miles_torch.packing import plan

TOLERANCE = 2e-6
"""Of log-probabilities of size 5 in float32: some ten roundings, in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("prompts_trained", [False, True])
def test_logprobs_equal_those_of_each_sample_alone(folder, temperature, prompts_trained):
    trainer = make_trainer(folder)
    batch = make_batch(temperature=temperature)
    if prompts_trained:
        everything = np.ones(batch.tokens_total, np.bool_)
        everything[batch.cu_seqlens[:-1]] = False
        batch = batch.with_columns(mask=everything)
    column = trainer.logprobs(batch, "policy", 0)
    assert trainer._policy.packed
    model = plain_model(folder, exported(trainer))
    for sample in range(len(batch)):
        expected, _, rows = alone(model, batch, sample)
        np.testing.assert_allclose(column[rows], expected.detach(), atol=TOLERANCE, rtol=TOLERANCE)
    assert not column[~batch["mask"]].any()


@pytest.mark.parametrize("entropy", [False, True])
def test_loss_and_gradients_equal_plain_torch(folder, entropy):
    trainer = make_trainer(folder, entropy=entropy)
    batch = make_batch(temperature=0.8)
    model = plain_model(folder, exported(trainer))
    objective = plain_objective(model, batch, entropy=entropy)
    objective.backward()
    gradients = {}
    trainer._optimizer.step = lambda: gradients.update(
        {name: p.grad.clone() for name, p in trainer._policy.model.named_parameters()}
    )
    metrics = trainer.update(batch, 0, 1)
    assert metrics["loss"] == pytest.approx(objective.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm(model), rel=1e-5)
    scale = min(1.0, 1.0 / metrics["grad_norm"])  # the default clips at 1
    for name, parameter in model.named_parameters():
        expected = scale * parameter.grad
        torch.testing.assert_close(gradients[name], expected, atol=1e-6 * float(expected.abs().max()) + 1e-8, rtol=1e-4)


@pytest.mark.parametrize("budget", [1, 20, 64, 10_000])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_results_do_not_depend_on_micro_batches(folder, budget, checkpointing):
    batch = make_batch()
    whole = make_trainer(folder, entropy=True).update(batch, 0, 1)
    parts = make_trainer(
        folder, entropy=True, micro_batch_tokens=budget, activation_checkpointing=checkpointing
    ).update(batch, 0, 1)
    for name in ("loss", "grad_norm", "entropy", "mismatch/kl", "mismatch/logprob_abs", "tokens"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_before_an_update_old_and_new_logprobs_are_equal(folder):
    trainer = make_trainer(folder, micro_batch_tokens=40)
    batch = make_batch(minibatches=2)
    batch = batch.with_columns(old_logprobs=trainer.logprobs(batch, "policy", 0))
    kls = []
    step = trainer._optimizer_step
    trainer._optimizer_step = lambda *args, **kwargs: kls.append(step(*args, **kwargs)) or kls[-1]
    trainer.update(batch, 0, 1)
    assert abs(kls[0]["ppo_kl"]) < 1e-9
    assert abs(kls[1]["ppo_kl"]) > 1e-6


def test_missing_old_logprobs_are_the_policys_own(folder):
    batch = make_batch()
    assert make_trainer(folder).update(batch, 0, 1)["ppo_kl"] == 0.0
    with pytest.raises(ValueError, match="2 optimizer steps on a batch need its column old_logprobs"):
        make_trainer(folder).update(batch, 0, 2)


def test_mismatch_is_measured_before_the_weights_change(folder):
    trainer = make_trainer(folder)
    batch = make_batch()
    column = trainer.logprobs(batch, "policy", 0).astype(np.float64)
    difference = (column - batch["rollout_logprobs"])[batch["mask"]]
    metrics = trainer.update(batch.with_columns(old_logprobs=column), 0, 2)
    assert metrics["mismatch/logprob_abs"] == pytest.approx(np.abs(difference).mean(), rel=1e-6)
    assert metrics["mismatch/logprob_abs_max"] == pytest.approx(np.abs(difference).max(), rel=1e-6)
    ratio = np.exp(difference)
    share = ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())
    assert metrics["mismatch/effective_share"] == pytest.approx(share, rel=1e-6)
    assert metrics["mismatch/kl"] == pytest.approx((np.exp(difference) - 1 - difference).mean(), rel=1e-5)
    assert metrics["tokens"] == batch["mask"].sum()


def test_without_generated_tokens_there_is_no_mismatch(folder):
    batch = make_batch()
    metrics = make_trainer(folder).update(batch.with_columns(versions=np.full(batch.tokens_total, -1)), 0, 1)
    assert not any(name.startswith("mismatch") for name in metrics)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_a_teachers_tokens_have_the_logprobs_and_gradients_of_plain_torch(folder, entropy, chunked, monkeypatch):
    """Also where one of them is the sampled token, and where logits are made in chunks."""
    if chunked:
        monkeypatch.setattr(model_module, "LOGITS_LIMIT", 5 * 97)
    rng = np.random.default_rng(0)
    batch = make_batch(temperature=0.8)
    top = rng.integers(0, 97, (batch.tokens_total, 4)).astype(np.int32)
    top[::2, 1] = batch["tokens"][::2]
    batch = batch.with_columns(teacher_top_tokens=top, teacher_top_logprobs=-rng.random(top.shape).astype(np.float32))

    def loss(inputs, options):
        losses = (inputs.teacher_top_logprobs * inputs.top_logprobs.square()).sum(-1) + inputs.logprobs
        return LossOutputs(losses=losses if inputs.entropy is None else losses - 0.3 * inputs.entropy)

    needs = frozenset({"teacher_top_tokens", "teacher_top_logprobs"})
    trainer = make_trainer(folder, entropy=entropy, loss=loss, needs=needs, micro_batch_tokens=40)
    model = plain_model(folder, exported(trainer))
    metrics = trainer.update(batch, 0, 1)
    objective = torch.zeros(())
    for sample in range(len(batch)):
        start, end = batch.cu_seqlens[sample : sample + 2]
        tokens, chosen = torch.from_numpy(batch["tokens"][start:end]).long(), torch.from_numpy(top[start:end]).long()
        table = (model(tokens[None]).logits[0, :-1] / 0.8).log_softmax(-1)
        teacher = torch.from_numpy(batch["teacher_top_logprobs"][start + 1 : end])
        losses = (teacher * table.gather(1, chosen[1:]).square()).sum(-1) + table.gather(1, tokens[1:, None])[:, 0]
        if entropy:
            losses = losses + 0.3 * (table.exp() * table).sum(-1)
        objective = objective + (torch.from_numpy(batch["weights"][start + 1 : end]).float() * losses).sum()
    objective.backward()
    assert metrics["loss"] == pytest.approx(objective.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm(model), rel=1e-5)


def test_chunked_logits_change_nothing(folder, monkeypatch):
    batch = make_batch()
    whole = make_trainer(folder, entropy=True).update(batch, 0, 1)
    monkeypatch.setattr(model_module, "LOGITS_LIMIT", 97 * 7)
    parts = make_trainer(folder, entropy=True).update(batch, 0, 1)
    for name in ("loss", "grad_norm", "entropy"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("GPT2", {"n_positions": 64}),
        ("Gemma2", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "sliding_window": 4}),
        ("Mistral", {"sliding_window": 4}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        ("Mamba", {"state_size": 4}),
    ],
)
def test_other_architectures_give_their_own_logprobs(tmp_path, kind, changes):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
        architectures=[{"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")],
        **({"num_key_value_heads": 2, "head_dim": 8} if kind in ("Llama", "Gemma2", "Mistral", "Qwen3Moe") else {}),
        **changes,
    )
    config.save_pretrained(tmp_path)
    trainer = make_trainer(tmp_path)
    assert trainer._policy.packed == (kind in ("Llama", "GPT2", "Qwen3Moe"))
    batch = make_batch()
    model = plain_model(tmp_path, exported(trainer))
    if kind == "Gemma2":
        model.set_attn_implementation("eager")  # the only one that knows its soft cap of scores
        trainer._policy.model.set_attn_implementation("eager")
    column = trainer.logprobs(batch, "policy", 0)
    for sample in range(len(batch)):
        expected, _, rows = alone(model, batch, sample)
        np.testing.assert_allclose(column[rows], expected.detach(), atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    groups=st.integers(1, 6),
    samples=st.integers(1, 5),
    budget=st.integers(1, 200),
    ranks=st.integers(1, 5),
    share=st.booleans(),
)
def test_a_plan_trains_every_token_once_on_equally_many_micro_batches(seed, groups, samples, budget, ranks, share):
    batch = make_batch(seed, groups, samples)
    planned = plan(batch, range(len(batch)), budget=budget, world_size=ranks, share=share)
    assert len({len(own) for own in planned}) == 1
    real = [packed for own in planned for packed in own if not packed.dummy]
    rows = np.concatenate([packed.rows for packed in real] or [np.empty(0, np.int64)])
    assert sorted(rows) == np.flatnonzero(batch["mask"]).tolist()
    for packed in real:
        assert len(packed.tokens) <= budget or packed.samples == 1 or len(packed.trees) == 1
        np.testing.assert_array_equal(batch["tokens"][packed.rows], packed.targets)
        ids = batch.segment_ids[packed.rows]
        places = packed.rows - batch.cu_seqlens[ids]
        np.testing.assert_array_equal(packed.positions[packed.sources], places - 1)
        np.testing.assert_array_equal(packed.tokens[packed.sources], batch["tokens"][packed.rows - 1])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    shape=st.sampled_from([(5,), (5, 1), (5, 4)]),
    with_entropy=st.booleans(),
    rows=st.sampled_from([1, 2, 5]),
)
def test_token_logprobs_and_entropy_have_the_gradients_of_log_softmax(seed, temperature, shape, with_entropy, rows):
    """Of one token a place or of several, the same one twice perhaps. rows: worked on at once."""
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(5, 11, generator=generator)).requires_grad_()
    targets = torch.randint(0, 11, shape, generator=generator)
    factors, factor = torch.randn(shape, generator=generator), torch.randn(5, generator=generator) * with_entropy
    with patch.object(logprobs_module, "CHUNK", rows * 11):
        picked, entropy = token_logprobs(logits, targets, temperature=temperature, entropy=with_entropy)
    double = logits.detach().double().requires_grad_()
    table = (double / temperature).log_softmax(-1)
    expected = table.gather(1, targets.view(5, -1)).view(shape)
    spread = -(table.exp() * table).sum(-1)
    torch.testing.assert_close(picked.double(), expected, atol=1e-5, rtol=1e-5)
    total = (picked * factors).sum()
    if with_entropy:
        torch.testing.assert_close(entropy.double(), spread, atol=1e-5, rtol=1e-5)
        total = total + (entropy * factor).sum()
    else:
        assert entropy is None
    with patch.object(logprobs_module, "CHUNK", rows * 11):
        (found,) = torch.autograd.grad(total, logits)
    (wanted,) = torch.autograd.grad((expected * factors).sum() + (spread * factor).sum(), double)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


def peak_of(work):
    """Most bytes that a function has allocated at once, those inside of torch's kernels as well."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("entropy", [False, True])
def test_logprobs_and_entropy_take_no_second_copy_of_the_logits(entropy, monkeypatch):
    """The forward pass allocates next to nothing, the backward pass their gradient; plain torch several copies."""
    rows, vocabulary = 256, 2048
    monkeypatch.setattr(logprobs_module, "CHUNK", rows * vocabulary // 32)
    logits, targets = torch.randn(rows, vocabulary, requires_grad=True), torch.arange(rows)

    def ours():
        picked, spread = token_logprobs(logits, targets, temperature=0.7, entropy=entropy)
        return picked.sum() if spread is None else picked.sum() + spread.sum()

    def plain():
        table = (logits / 0.7).log_softmax(-1)
        return table.gather(1, targets[:, None]).sum() - (table.exp() * table).sum() * entropy

    copy = logits.nbytes
    assert peak_of(ours) < 0.2 * copy
    assert peak_of(lambda: ours().backward()) < 1.2 * copy
    logits.grad = None
    assert peak_of(lambda: plain().backward()) > 2.9 * copy


def test_the_optimizer_is_adamw_with_clipping(folder):
    options = OptimizerOptions(learning_rate=0.01, max_grad_norm=0.05, weight_decay=0.3, warmup_steps=2)
    trainer = make_trainer(folder, optimizer=options)
    model = plain_model(folder, exported(trainer))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.3},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step, rate in enumerate((0.01 / 3, 0.02 / 3, 0.01)):
        batch = make_batch(step)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.zero_grad()
        plain_objective(model, batch).backward()
        before = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        reference.step()
        metrics = trainer.update(batch, step, 1)
        assert metrics["grad_norm"] == pytest.approx(before.item(), rel=1e-4)
        assert metrics["learning_rate"] == pytest.approx(rate)
    for name, tensor in exported(trainer).items():
        # Adam divides by the gradient's size, so the rounding of tiny gradients shows at the scale of the rate.
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1 / 3, 2 / 3, 1.0, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.1 + 0.9 * (2 + 2**0.5) / 4, 0.55, 0.1 + 0.9 * (2 - 2**0.5) / 4, 0.1]),
    ],
)
def test_schedules_rise_and_fall(schedule, expected):
    options = OptimizerOptions(learning_rate=1.0, schedule=schedule, warmup_steps=2, min_ratio=0.1)
    assert [optimizer.learning_rate(options, step, 6) for step in range(7)] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_names_sample_and_token(folder):
    batch = make_batch(holes=False)
    row = int(batch.cu_seqlens[5]) - 1  # the last token of sample 1/1
    gains = batch["advantages"].copy()
    gains[row] = np.nan
    trainer = make_trainer(folder)
    before = exported(trainer)
    place = row - int(batch.cu_seqlens[4])
    with pytest.raises(RunError, match=rf"sample 1/1, token {place} \(id {batch['tokens'][row]}\).*loss nan"):
        trainer.update(batch.with_columns(advantages=gains), 0, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in exported(trainer).items())


def test_a_loss_that_averages_is_refused(folder):
    trainer = make_trainer(folder, loss=lambda inputs, options: LossOutputs(losses=inputs.logprobs.mean()))
    with pytest.raises(RunError, match="one per token"):
        trainer.update(make_batch(), 0, 1)


def test_a_batch_without_trained_tokens_leaves_the_gradient_at_zero(folder):
    batch = make_batch()
    nothing = np.zeros(batch.tokens_total, np.bool_)
    metrics = make_trainer(folder).update(batch.with_columns(mask=nothing), 0, 1)
    assert metrics["tokens"] == 0
    assert metrics["grad_norm"] == 0


def test_the_reference_is_the_policy_at_the_start_of_the_stage(folder):
    trainer = make_trainer(folder, reference=True)
    batch = make_batch()
    before = trainer.logprobs(batch, "policy", 0)
    trainer.update(batch, 0, 1)
    np.testing.assert_array_equal(trainer.logprobs(batch, "reference", 0), before)
    assert np.abs(trainer.logprobs(batch, "policy", 0) - before).max() > 1e-3
    after = trainer.logprobs(batch, "policy", 0)
    trainer.begin(trainer._stage)
    np.testing.assert_array_equal(trainer.logprobs(batch, "reference", 0), after)


def test_hooks_hear_the_live_objects_and_add_metrics(folder):
    heard = []

    class Hooks:
        def model_built(self, context, model):
            heard.append(("model_built", type(model).__name__))
            with torch.no_grad():
                model.model.norm.weight.fill_(0.5)

        def before_logprobs(self, context, step, model):
            heard.append(("before_logprobs", step))

        def before_train_step(self, context, step, model, optimizer, batch):
            heard.append(("before_train_step", step, len(batch)))

        def after_train_step(self, context, step, model, optimizer, metrics):
            heard.append(("after_train_step", optimizer.param_groups[0]["lr"] == metrics["learning_rate"]))
            metrics["mine"] = 3.0

    trainer = make_trainer(folder, hooks=Hooks())
    batch = make_batch()
    trainer.logprobs(batch, "policy", 4)
    assert trainer.update(batch, 5, 1)["mine"] == 3.0
    assert heard == [
        ("model_built", "Qwen3ForCausalLM"),
        ("before_logprobs", 4),
        ("before_train_step", 5, 12),
        ("after_train_step", True),
    ]
    model = plain_model(folder, exported(make_trainer(folder, hooks=Hooks())))
    assert model.model.norm.weight.eq(0.5).all()


def test_pickled_weights_are_refused(tmp_path):
    (tiny_model(tmp_path) / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors"):
        make_trainer(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda held: held.pop("model.norm.weight"), "lacks the tensor model.norm.weight, which the model's config"),
        (
            lambda held: held.update({"model.norm.weight": torch.ones(7)}),
            r"model.norm.weight has shape \(7,\), but the model's config.json makes it \(\d+,\)",
        ),
    ],
)
def test_weights_that_would_be_drawn_at_random_are_refused(change, error, tmp_path):
    model_module.load(tiny_model(tmp_path), 0).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    change(held)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=error):
        make_trainer(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"betas": (0.9,)}, {"eps": 0.0}, {"learning_rate": -1.0}, {"min_ratio": 1.5}, {"betas": (0.9, 1.0)}],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(wrong))}"):
        OptimizerOptions(**wrong)
