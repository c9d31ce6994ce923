"""Whole runs with the trainer `megatron` on two CPU ranks, of a policy and its critic, and the engine `torch`."""

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
every = 1
[trainer]
name = "megatron"
ranks = 2
checkpoint = { async_save = true }
[trainer.parallel]
tensor_model_parallel_size = 2
sequence_parallel = true
[trainer.optimizer]
lr = 3e-3
""",
    )
    .replace(
        """
[advantage]
name = "grpo"
[loss]
name = "grpo"
""",
        """
[critic]
loss = "critic"
warmup_steps = 1
optimizer = { lr = 1e-2 }
[advantage]
name = "gae"
kl_coef = 0.1
[loss]
name = "ppo"
""",
    )
    .replace("num_key_value_heads = 1", "num_key_value_heads = 2")
)


@pytest.fixture(scope="module")
def miles(tmp_path_factory: pytest.TempPathFactory) -> Miles:
    made = Miles(tmp_path_factory.mktemp("megatron"))
    (made.folder / "megatron.toml").write_text(MEGATRON)
    return made


def test_a_run_trains_publishes_and_resumes_bit_for_bit(miles: Miles) -> None:
    # kill -9 while the checkpoint of step 2 is being written, or waits for its name
    process = miles.start("train", "megatron.toml", "name=run", probe={"pause_step": 3})
    miles.wait_for_note("paused", process, step=3)
    miles.kill()
    process.communicate()
    half, last = sorted(path.name for path in (miles.folder / "runs/run/checkpoints").iterdir())
    assert (half.endswith(".incomplete"), last) == (True, "step-00000001")
    before = miles.metrics("run")
    assert [line["step"] for line in before] == [1, 2, 3]

    resumed = miles.run("resume", str(Path("runs/run")))
    assert (resumed.code, resumed.left_over) == (0, []), resumed.err
    after = miles.metrics("run")
    assert [line["step"] for line in after] == [1, 2, 3, 4]
    assert apart_from_times(after[:3]) == apart_from_times(before)
    assert "step-00000004" in [path.name for path in (miles.folder / "runs/run/checkpoints").iterdir()]
    assert not [path for path in (miles.folder / "runs/run/checkpoints").iterdir() if path.suffix == ".incomplete"]

    assert {note["role"] for note in miles.notes("members")} == {"trainer 0", "trainer 1", "engine 0"}
    steps = [line for line in after if "loss" in line]
    assert len(steps) == 3  # the first teaches the critic alone
    assert len([line for line in after if line.get("critic/learning_rate") == 1e-2]) == 4
    # The engine's log-probabilities are those of the trainer, so each version of the weights has arrived.
    worst = [value for line in steps for name, value in line.items() if name.endswith("mismatch/logprob_abs_max")]
    assert len(worst) == 3
    assert max(worst) < 1e-4


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(miles: Miles) -> None:
    refused = miles.run("plan", "megatron.toml", "trainer.parallel.tensor_model_parallel_size=4")
    assert refused.code == 2
    assert refused.err.startswith(
        "Error: flag trainer.parallel.tensor_model_parallel_size=4: trainer.parallel: tensor_"
    )
    assert "context_parallel_size 1 = 4 does not divide the 2 ranks" in refused.err
    misspelt = miles.run("plan", "megatron.toml", "trainer.parallel.tensor_parallel_size=2")
    assert misspelt.code == 2
    assert "Did you mean 'tensor_model_parallel_size'" in misspelt.err


def test_megatrons_own_flags_stand_after_two_dashes(miles: Miles) -> None:
    flags = ("--recompute-granularity", "full", "--tensor-model-parallel-size", "1")
    planned = miles.run("plan", "megatron.toml", "trainer.parallel.sequence_parallel=false", "--", *flags)
    assert planned.code == 0, planned.err
    lines = [line.split(maxsplit=2) for line in planned.out.splitlines()]
    assert ["trainer.transformer.recompute_granularity", '"full"', "flag --recompute-granularity full"] in lines
    assert ["trainer.parallel.tensor_model_parallel_size", "1", "flag --tensor-model-parallel-size 1"] in lines
