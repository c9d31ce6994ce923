"""What a rollout may give wrongly, through a whole run: one error that names the sample, or a neutral result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import one_process
import pytest
import torch
from run_kit import MODEL
from safetensors.torch import load_file

from miles_core.errors import RunError
from miles_core.specs import RolloutSpec
from miles_torch.model import load, weights

RUN = (
    """
[data]
name = "jsonl"
path = "data.jsonl"
[reward]
name = "even"
[sampling]
max_new_tokens = 4
[engine]
name = "torch"
[trainer]
name = "torch"
[trainer.optimizer]
learning_rate = 1e-3
weight_decay = 0.1
[schedule]
steps = 2
prompts_per_step = 2
samples_per_prompt = 2
"""
    + MODEL
)

ALGORITHMS: Mapping[str, list[str]] = {
    "grpo": ["advantage=grpo", "loss=grpo"],
    "ppo": ["advantage=gae", "loss=ppo", "critic.loss=critic"],
}


def train(rollout: str, algorithm: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """The metrics of a run with one of the rollouts of `spoiled`."""
    spoiled = RolloutSpec(name="spoiled", ref=f"spoiled:{rollout}", summary="Does something wrong.")
    rows = [json.dumps({"prompt": f"{number} + 1 =", "answer": number + 1}) for number in range(8)]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "run.toml").write_text(RUN)
    monkeypatch.chdir(folder)
    flags = [*ALGORITHMS[algorithm], "rollout=spoiled"]
    return one_process.train("run.toml", flags, one_process.catalog(spoiled), monkeypatch)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ("Empty", r"rollout spoiled gave the samples \(none\) of prompt \d; it must give \d/0 to \d/1"),
        ("Fewer", r"rollout spoiled gave the samples \d/1 of prompt \d; it must give \d/0 to \d/1"),
        ("Ragged", r"sample \d/0: response, mask, logprobs and versions disagree in length \(4, 4, 3, 4\)"),
        ("Impossible", r"rollout_logprobs is -inf at token \d+ of sample \d/1: not finite"),
    ],
)
def test_what_is_wrong_with_a_sample_is_said_by_its_name(
    rollout: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match=message):
        train(rollout, "grpo", tmp_path, monkeypatch)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_batch_without_a_trained_token_changes_nothing(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = train("Masked", algorithm, tmp_path, monkeypatch)
    assert len(steps) == 2
    for step in steps:
        assert (step["loss"], step["grad_norm"], step["trained_tokens"]) == (0.0, 0.0, 0.0)
        assert step.get("critic/loss", 0.0) == 0.0
        assert all(math.isfinite(value) for value in step.values())
    run = tmp_path / "runs/run"
    begun, finished = weights(load(run / "model", 0)), load_file(run / "policy/model.safetensors")
    assert begun.keys() == finished.keys()
    assert all(torch.equal(finished[name], tensor) for name, tensor in begun.items())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_samples_without_a_trained_token_leave_the_others_alone(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in train("HalfMasked", algorithm, tmp_path, monkeypatch):
        assert all(math.isfinite(value) for value in step.values())
        assert step["grad_norm"] > 0
        assert 2 <= step["trained_tokens"] <= 8
