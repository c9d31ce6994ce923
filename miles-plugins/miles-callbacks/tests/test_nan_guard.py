"""nan-guard on a trainer whose loss is not finite for some samples."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from callback_kit import batch_of, make_trainer, weights

from miles_callbacks import options
from miles_callbacks.nan_guard import NanGuard
from miles_core.errors import RunError
from miles_core.plugins import lifecycle
from miles_core.testing.fakes import make_run

FIRST = "model.embed_tokens.weight"
"""The first parameter, which every token's gradient reaches."""


def guard(patience: int = 3) -> NanGuard:
    return NanGuard(options.NanGuard(patience=patience))


def test_without_it_the_run_stops(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [])
    with pytest.raises(RunError, match=r"sample 0/2.*the step was not taken"):
        trainer.update(batch_of(bad=[2]), 0, 1)


def test_a_step_that_is_not_finite_is_skipped_and_sample_and_parameters_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, other = make_trainer(tmp_path, [guard()]), make_trainer(tmp_path, [])
    before = weights(trainer)
    with caplog.at_level(logging.WARNING):
        metrics = trainer.update(batch_of(bad=[2]), 0, 1)
    assert torch.equal(weights(trainer), before)
    assert metrics["skipped_steps"] == 1
    assert all(math.isfinite(value) for value in metrics.values())
    (message,) = (record.getMessage() for record in caplog.records)
    assert "nan-guard: step 0 is skipped, 1 in a row. sample 0/2, token" in message
    assert f"\n  gradients that are not finite: {FIRST} (" in message
    # Afterwards it goes on as if the step had never been.
    trainer.update(batch_of(seed=1), 1, 1)
    other.update(batch_of(seed=1), 1, 1)
    assert torch.equal(weights(trainer), weights(other))


@pytest.mark.parametrize("steep", [0, 3, 5])
def test_a_gradient_that_is_not_finite_names_sample_and_parameters(
    steep: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever the sample stands; of the parameters behind its loss none is spared."""
    trainer = make_trainer(tmp_path, [guard()])
    batch = batch_of(steep=[steep])
    with caplog.at_level(logging.WARNING):
        assert trainer.update(batch, 0, 1)["skipped_steps"] == 1
    (message,) = (record.getMessage() for record in caplog.records)
    name = f"{batch.samples['group'][steep]}/{batch.samples['index'][steep]}"
    assert f"although all losses are finite; that of sample {name} alone is not finite either." in message
    assert f"\n  gradients that are not finite: {FIRST} (" in message


def test_of_broken_parameters_only_those_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Breaks:
        def before_train_step(self, model: torch.nn.Module) -> None:
            dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"].register_hook(lambda g: g * math.nan)

    trainer = make_trainer(tmp_path, [Breaks(), guard()])
    with caplog.at_level(logging.WARNING):
        assert trainer.update(batch_of(), 0, 1)["skipped_steps"] == 1
    size = 48 * 32
    assert "that of sample 0/0 alone is not finite either" in caplog.text  # as that of any other
    assert f"gradients that are not finite: model.layers.1.mlp.up_proj.weight ({size} entries)" in caplog.text


def test_gradients_are_found_where_megatron_puts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(3, 2)
    for name, parameter in model.named_parameters():
        gradient = torch.full_like(parameter, 1.0 if name == "bias" else math.inf)
        parameter.main_grad = gradient  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        assert guard().step_not_finite(context=make_trainer(tmp_path, []).context, step=0, model=model, fault="why")
    assert caplog.text.rstrip().endswith("gradients that are not finite: weight (6 entries)")


def test_a_gradient_that_no_sample_has_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The norm of their sum overflows, of which no entry does."""

    class Overflows:
        def before_train_step(self, model: torch.nn.Module) -> None:
            weight = dict(model.named_parameters())[FIRST]
            value = math.sqrt(torch.finfo(torch.float32).max / weight.numel()) / 4  # so that one has a norm, four none
            weight.register_hook(lambda g: torch.full_like(g, value))

    trainer = make_trainer(tmp_path, [Overflows(), guard()], micro_batch_tokens=1)
    with caplog.at_level(logging.WARNING):
        assert trainer.update(batch_of(), 0, 1)["skipped_steps"] == 1
    assert "none of its 11 samples gives such a gradient alone" in caplog.text
    assert "gradients that are not finite" not in caplog.text


def test_it_is_patient_only_for_so_long(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [guard(patience=2)])
    bad, good = batch_of(bad=[0]), batch_of(seed=1)
    for batch in (bad, bad, good, bad, bad):
        trainer.update(batch, 0, 1)
    with pytest.raises(RunError, match="sample 0/0"):
        trainer.update(bad, 0, 1)


def test_broken_weights_stop_the_run_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, [guard()])
    with torch.no_grad():
        trainer._policy.model.model.norm.weight[3] = math.nan
    with pytest.raises(RunError):
        trainer.update(batch_of(), 0, 1)
    assert "step 0 stops the run" in caplog.text
    assert "weights that are not finite: model.norm.weight (1 entries)" in caplog.text


def test_of_several_mini_batches_only_the_bad_one_is_skipped(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [guard()])
    before = weights(trainer)
    metrics = trainer.update(batch_of(bad=[3], minibatches=2), 0, 2)
    assert metrics["skipped_steps"] == 2  # once in each pass
    assert not torch.equal(weights(trainer), before)


def test_the_terminal_hears_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hooks = lifecycle("driver", [guard()])
    run = make_run(tmp_path)
    hooks.step_end(run=run, step=1, metrics={"loss": 1.0})
    assert caplog.text == ""
    hooks.step_end(run=run, step=2, metrics={"skipped_steps": 2.0})
    assert f"nan-guard: step 2: 2 optimizer steps skipped; see {tmp_path}/logs" in caplog.text


def test_the_first_callback_that_decides_decides(tmp_path: Path) -> None:
    class Stubborn:
        def step_not_finite(self) -> bool:
            return False

    class Unsure:
        def step_not_finite(self) -> None:
            return None

    with pytest.raises(RunError):
        make_trainer(tmp_path, [Stubborn(), guard()]).update(batch_of(bad=[1]), 0, 1)
    assert "skipped_steps" in make_trainer(tmp_path, [Unsure(), guard(), Stubborn()]).update(batch_of(bad=[1]), 0, 1)
