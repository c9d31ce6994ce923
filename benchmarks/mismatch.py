"""How far the trainer's log-probabilities lie from SGLang's for the same samples, in bfloat16, and from its own.

A whole run by `miles train` on one GPU, colocated: random weights of the shape of Qwen3-0.6B, 32 prompts of 64 tokens,
4 samples of 256 tokens each. Its learning rate is 0, and each batch is trained on twice, so that the policy is compared
with the log-probabilities that it gave itself before: that must be exactly 0, in every pass.

    python benchmarks/mismatch.py [--trainer megatron|torch] [--steps 2] [--sleep] [--cpu-tiny]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from publish import SHAPE, TINY

SHOWN = {
    "mismatch/logprob_abs": "mean |trainer - rollout|",
    "mismatch/logprob_abs_max": "largest |trainer - rollout|",
    "mismatch/kl": "KL(rollout || trainer)",
    "ppo_kl": "policy against itself",
    "ratio": "mean ratio of the policy to itself",
    "seconds/generate": "seconds of generating",
    "seconds/train": "seconds of training",
    "seconds/publish": "seconds of publishing",
    "seconds/turns": "seconds of sleeping and waking",
    "seconds/other": "seconds of all else",
    "response_tokens": "tokens",
}

RUN = """
[model]
family = "qwen3"
tokenizer = "bytes"
max_tokens = 320
[data]
name = "jsonl"
path = "prompts.jsonl"
[reward]
name = "exact"
[sampling]
max_new_tokens = 256
[engine]
name = "sglang"
[engine.server]
mem_fraction_static = 0.4
disable_prefill_cuda_graph = true
cuda_graph_bs_decode = [1, 64, 128]
[advantage]
name = "grpo"
[loss]
name = "grpo"
[schedule]
prompts_per_step = 32
samples_per_prompt = 4
updates_per_batch = 2
[placement]
layout = "colocated"
"""


def values(arguments: argparse.Namespace) -> list[str]:
    """What differs between the trainers, and between GPU and CPU."""
    shape = {**SHAPE, **(TINY if arguments.cpu_tiny else {})}
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings")  # fmt: skip
    said: dict[str, Any] = {
        "trainer.name": arguments.trainer,
        "schedule.steps": arguments.steps,
        "placement.sleep": arguments.sleep,
        **{f"model.config.{name}": shape[name] for name in kept},
    }
    if arguments.cpu_tiny:
        said |= {"model.config.vocab_size": 512, "sampling.max_new_tokens": 16, "schedule.prompts_per_step": 4}
    else:
        said |= {"model.dtype": "bfloat16", "trainer.gpus": 1, "engine.gpus": 1}
        said |= {"trainer.parallel.bf16": True} if arguments.trainer == "megatron" else {"trainer.dtype": "bfloat16"}
    rate = "lr" if arguments.trainer == "megatron" else "learning_rate"
    return [f"{name}={json.dumps(value)}" for name, value in {**said, f"trainer.optimizer.{rate}": 0.0}.items()]


def main() -> None:
    """See the head of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=("megatron", "torch"), default="megatron")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sleep", action="store_true", help="engine and trainer give their memory back in turns")
    parser.add_argument("--cpu-tiny", action="store_true", help="a tiny model on the CPU: only to see that it runs")
    arguments = parser.parse_args()
    letters = np.random.default_rng(0).integers(97, 123, (64, 64)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"prompt": bytes(row).decode(), "answer": "none"}) for row in letters]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
        (folder / "mismatch.toml").write_text(RUN)
        command = [sys.executable, "-m", "miles_core", "train", "mismatch.toml", *values(arguments)]
        subprocess.run(command, cwd=folder, check=True)
        lines = (folder / "runs" / "mismatch" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    for metric, what in SHOWN.items():
        found = [step[metric] for step in steps if metric in step]
        print(f"{what:40}", *(f"{value:12.6g}" for value in found))


if __name__ == "__main__":
    main()
