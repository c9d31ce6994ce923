"""The main job, whole: `miles train arithmetic`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from miles_core.run.trackers import read_metrics


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_grpo_lifts_held_out_accuracy_by_thirty_points_to_eighty_percent(tmp_path: Path) -> None:
    miles = Path(sys.executable).with_name("miles")
    done = subprocess.run([miles, "train", "arithmetic"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    run = tmp_path / "runs" / "arithmetic"
    accuracy = {step: metrics["eval/reward"] for step, metrics in read_metrics(run) if "eval/reward" in metrics}
    before, warmed_up, after = accuracy[0], accuracy[140], accuracy[300]
    assert before < 0.05
    assert after - warmed_up >= 0.3
    assert after >= 0.8
    assert "held-out evaluation" in done.stdout
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert _generates(run / "policy")


def _generates(policy: Path) -> bool:
    """Whether transformers loads the policy, and it answers a sum rightly."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    model: Any = AutoModelForCausalLM.from_pretrained(policy)
    answers = 0
    for question, answer in (("2 + 3 =", "5"), ("7 - 4 =", "3"), ("9 - 3 =", "6"), ("4 + 4 =", "8")):
        prompt = tokenizer(question, return_tensors="pt")
        tokens = model.generate(**prompt, do_sample=False, max_new_tokens=6)[0, prompt["input_ids"].shape[1] :]
        answers += tokenizer.decode(tokens, skip_special_tokens=True) == answer
    return answers >= 2
