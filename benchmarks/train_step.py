"""The trainer's forward and backward pass against a padded transformers one with the same loss.

One thread each, interleaved, float32 on the CPU; the ratio is of medians. Both compute the log-probabilities of the
response tokens and the gradients of sum(weights * loss) for a 3.4-million-parameter Qwen3 shape. The padded side is
what a plain training loop does: right-padded rows, logits of the response positions only, log_softmax and gather.

    python benchmarks/train_step.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config

from miles_core.roles import LossInputs, LossOutputs, TrainerContext, TrainStage
from miles_core.sample import Batch, Sample
from miles_torch.metrics import Sums
from miles_torch.options import TrainerOptions
from miles_torch.trainer import TorchTrainer

SHAPES = {"8 x 4, prompt 64, response 64": (8, 4, 64, 64), "32 x 8, prompt 64, response 6": (32, 8, 64, 6)}


def loss(inputs: LossInputs, options: None) -> LossOutputs:
    """The clipped policy-gradient loss."""
    assert inputs.old_logprobs is not None
    assert inputs.advantages is not None
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    clipped = ratio.clamp(0.8, 1.2)
    return LossOutputs(losses=-torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages))


def make_batch(prompts: int, samples: int, prompt: int, response: int) -> Batch:
    """Random tokens; responses between half of and the whole of `response` tokens."""
    rng = np.random.default_rng(0)
    made = []
    for group in range(prompts):
        tokens = rng.integers(0, 1024, prompt).astype(np.int32)
        for index in range(samples):
            size = int(rng.integers(response // 2, response + 1))
            made.append(
                Sample(
                    group=group,
                    index=index,
                    prompt=tokens,
                    response=rng.integers(0, 1024, size).astype(np.int32),
                    mask=np.ones(size, np.bool_),
                    logprobs=np.full(size, -7, np.float32),
                    versions=np.zeros(size, np.int32),
                    status="completed",
                    text="",
                    reward=0.0,
                )
            )
    batch = Batch.pack(made)
    return batch.with_columns(
        weights=batch["mask"] / batch["mask"].sum(), advantages=rng.standard_normal(batch.tokens_total)
    )


def make_trainer(folder: Path, hooks: Any = None) -> TorchTrainer:
    """A trainer with random weights, its loss set. hooks: those of callbacks, as in `TrainerContext`."""
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    options = TrainerOptions()
    context = TrainerContext(
        model=folder,
        rank=0,
        world_size=1,
        address="tcp://127.0.0.1:0",
        gpus=0,
        threads=1,
        seed=0,
        reference=False,
        timeout_s=60,
        hooks=hooks,
    )
    trainer = TorchTrainer(options, context)
    trainer.start()
    needs = frozenset({"advantages", "old_logprobs"})
    trainer.begin(
        TrainStage(
            name="bench", loss=loss, loss_options=None, entropy=False, needs=needs, optimizer_steps=1, options=options
        )
    )
    return trainer


def packed_side(trainer: TorchTrainer, batch: Batch) -> Callable[[], float]:
    """Forward and backward as `update` runs them."""

    def run() -> float:
        trainer._policy.zero_grad()
        sums = Sums(torch.device("cpu"))
        for packed in trainer._plan(batch, range(len(batch))):
            trainer._forward_backward(batch, packed, sums, first=False)
        return sums.reduce()["loss"][0]

    return run


def padded_side(model: Any, batch: Batch) -> Callable[[], float]:
    """Right-padded rows in micro-batches of the same 16,384 tokens."""
    longest = int(batch.lengths.max())
    prompt = int(batch.samples["prompt_length"].min())
    rows = np.minimum(batch.cu_seqlens[:-1, None] + np.arange(longest), batch.tokens_total - 1)
    inside = np.arange(longest) < batch.lengths[:, None]
    tokens = torch.from_numpy(np.where(inside, batch["tokens"][rows], 0)).long()
    weights = torch.from_numpy(np.where(inside, batch["weights"][rows], 0)).float()
    advantages = torch.from_numpy(np.where(inside, batch["advantages"][rows], 0)).float()
    attention = torch.from_numpy(inside).long()
    size = max(1, 16384 // longest)

    def run() -> float:
        model.zero_grad()
        total = 0.0
        for part in (slice(start, start + size) for start in range(0, len(batch), size)):
            keep = longest - prompt + 1
            logits = model(tokens[part], attention_mask=attention[part], use_cache=False, logits_to_keep=keep).logits
            logprobs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[part, prompt:, None])[..., 0]
            ratio = (logprobs - logprobs.detach()).exp()
            gain = advantages[part, prompt:]
            value = (-torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain) * weights[part, prompt:]).sum()
            value.backward()  # type: ignore[no-untyped-call]
            total += value.item()
        return total

    return run


def measure(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name, run in sides.items():
            started = time.process_time()
            run()
            if number >= 2:
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Prints a line per shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        plain = make_trainer(Path(folder))._policy.model
        plain.set_attn_implementation("sdpa")
        for title, shape in SHAPES.items():
            batch = make_batch(*shape)
            sides = {"miles": packed_side(trainer, batch), "padded": padded_side(plain, batch)}
            values = [run() for run in sides.values()]
            assert abs(values[0] - values[1]) < 1e-5 * max(1e-2, abs(values[1])), values
            medians = measure(sides, rounds)
            tokens = batch.tokens_total
            print(
                f"{title}: miles {medians['miles'] * 1e3:.0f} ms ({tokens / medians['miles']:,.0f} tokens/s), "
                f"padded {medians['padded'] * 1e3:.0f} ms, ratio {medians['padded'] / medians['miles']:.2f}"
            )


if __name__ == "__main__":
    main()
