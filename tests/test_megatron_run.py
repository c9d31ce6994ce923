"""Whole runs with the trainer `megatron` on two CPU ranks and the engine `torch`."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_kit import RUN, Miles, apart_from_times

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MEGATRON = (
    RUN.replace(
        """
[trainer]
name = "torch"
[trainer.optimizer]
learning_rate = 3e-3
""",
        """
[checkpoint]
every = 2
[trainer]
name = "megatron"
ranks = 2
[trainer.parallel]
tensor_model_parallel_size = 2
sequence_parallel = true
[trainer.optimizer]
lr = 3e-3
""",
    )
    .replace('name = "grpo"\n[schedule]', 'name = "grpo"\nkl_coef = 0.1\n[schedule]')
    .replace("num_key_value_heads = 1", "num_key_value_heads = 2")
)


@pytest.fixture(scope="module")
def miles(tmp_path_factory: pytest.TempPathFactory) -> Miles:
    made = Miles(tmp_path_factory.mktemp("megatron"))
    (made.folder / "megatron.toml").write_text(MEGATRON)
    return made


def test_a_run_trains_publishes_and_resumes_bit_for_bit(miles: Miles) -> None:
    whole = miles.run("train", "megatron.toml", "name=whole")
    assert (whole.code, whole.left_over) == (0, []), whole.err
    assert {note["role"] for note in miles.notes("members")} == {"trainer 0", "trainer 1", "engine 0"}
    steps = [line for line in miles.metrics("whole") if "loss" in line or "train/loss" in line]
    assert len(steps) == 4
    # The engine's log-probabilities are those of the trainer, so each version of the weights has arrived.
    worst = [value for line in steps for name, value in line.items() if name.endswith("mismatch/logprob_abs_max")]
    assert len(worst) == 4
    assert max(worst) < 1e-4

    process = miles.start("train", "megatron.toml", "name=broken", probe={"pause": [2, 200]})
    miles.wait_for_note("paused", process, step=2)
    miles.kill()
    process.communicate()
    resumed = miles.run("resume", str(Path("runs/broken")))
    assert resumed.code == 0, resumed.err
    assert apart_from_times(miles.metrics("broken")) == apart_from_times(miles.metrics("whole"))


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(miles: Miles) -> None:
    refused = miles.run("plan", "megatron.toml", "trainer.parallel.tensor_model_parallel_size=4")
    assert refused.code == 2
    assert "tensor 4 x pipeline 1 x context 1 = 4 ranks do not divide the trainer's 2" in refused.err
    misspelt = miles.run("plan", "megatron.toml", "trainer.parallel.tensor_parallel_size=2")
    assert misspelt.code == 2
    assert "Did you mean 'tensor_model_parallel_size'" in misspelt.err
