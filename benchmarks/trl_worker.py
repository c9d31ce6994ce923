"""TRL's side of `trl_grpo.py`: trains with GRPOTrainer and prints the seconds of every step as JSON.

It runs in TRL's own environment (`trl_grpo.py` says how to make one) and shares nothing with Miles but the workload
folder. The settings are the fastest ones for a CPU that we found. The whole batch is generated at once and trained
in two micro-batches (a tenth faster than in one, no slower than in four), one optimizer step per generation, without
reference model and gradient checkpointing, on one thread. A static cache is no faster.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class StepClock(TrainerCallback):
    """Seconds between the ends of steps, so that nothing of a step is left out."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def settings(workload: dict[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """The arguments of GRPOConfig."""
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": workload["prompts_per_step"] * workload["samples_per_prompt"] // 2,
        "gradient_accumulation_steps": 2,
        "num_generations": workload["samples_per_prompt"],
        "max_completion_length": workload["new_tokens"],
        "num_iterations": 1,
        "beta": 0.0,
        "learning_rate": workload["learning_rate"],
        "temperature": 1.0,
        "use_cpu": True,
        "bf16": workload["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "use_vllm": False,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "logging_steps": steps,
        "disable_tqdm": True,
        "report_to": [],
        "model_init_kwargs": {"dtype": "float32"},
    }


def main() -> None:
    """Trains for `--steps` steps on the workload in `folder`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="made by trl_grpo.py: workload.json, prompts.jsonl, model/")
    parser.add_argument("--steps", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder
    workload = json.loads((folder / "workload.json").read_text())
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]

    def reward(completion_ids: list[list[int]], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        assert {len(ids) for ids in completion_ids} == {workload["new_tokens"]}
        last = [float(text.split()[-1]) for text in completions]
        right = [float(text) for text in answer]
        return [float(abs(a - b) <= workload["tolerance"] * b) for a, b in zip(last, right, strict=True)]

    config = settings(workload, arguments.steps, folder)
    clock = StepClock()
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=GRPOConfig(**config),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock],
    )
    trainer.train()
    print(json.dumps({"settings": config, "seconds": clock.seconds}))


if __name__ == "__main__":
    main()
