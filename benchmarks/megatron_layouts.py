"""Loss, gradient norm and log-probabilities of the trainer `megatron` under each layout of two ranks, against one rank.

In float32 with the trainer's own layers the numbers must agree to rounding; in bfloat16 with Transformer Engine, to
what bfloat16 can tell: one rank with other micro-batches is shown beside them for a measure.

    python benchmarks/megatron_layouts.py [--cpu-tiny]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np

from miles_core.roles import LossInputs, LossOutputs, TrainerContext, TrainStage
from miles_core.sample import Batch, Sample

MODEL: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
TINY: Mapping[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2 sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
}
PRECISIONS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "float32, own layers": ({"transformer_impl": "local"}, {}),
    "bfloat16, Transformer Engine": ({}, {"bf16": True}),
}
STEPS = 3


def loss(inputs: LossInputs, options: None) -> LossOutputs:
    """A policy gradient with an entropy bonus and a term over whole sequences."""
    assert inputs.advantages is not None
    losses = -(inputs.logprobs - inputs.logprobs.detach()).exp() * inputs.advantages
    assert inputs.entropy is not None
    return LossOutputs(losses=losses - 0.1 * inputs.segments.spread(inputs.segments.mean(inputs.entropy)))


def make_batch(vocabulary: int, longest: int) -> Batch:
    """24 samples of different lengths."""
    rng = np.random.default_rng(1)
    made = []
    for group in range(24):
        size = int(rng.integers(longest // 4, longest))
        tokens = rng.integers(0, vocabulary, size + 8).astype(np.int32)
        made.append(
            Sample(
                group=group,
                index=0,
                prompt=tokens[:8],
                response=tokens[8:],
                mask=np.ones(size, np.bool_),
                logprobs=np.full(size, -9, np.float32),
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


def run_rank(job: Mapping[str, Any], rank: int, world_size: int, queue: Any) -> None:
    """One rank of one layout: trains a few steps; rank 0 reports."""
    from miles_megatron.options import TrainerOptions
    from miles_megatron.start import make_trainer

    options = TrainerOptions(
        micro_batch_tokens=job["tokens"],
        optimizer={"lr": 1e-3, "clip_grad": 1.0},
        transformer=job["transformer"],
        parallel=job["parallel"],
    )
    context = TrainerContext(
        model=Path(job["model"]),
        rank=rank,
        world_size=world_size,
        address=job["address"],
        gpus=job["gpus"],
        threads=1,
        seed=3,
        reference=False,
        timeout_s=120,
    )
    trainer = make_trainer(options, context)
    trainer.start()
    needs = frozenset({"advantages"})
    trainer.begin(
        TrainStage(
            name="only", loss=loss, loss_options=None, entropy=True, needs=needs, optimizer_steps=9, options=options
        )
    )
    batch = make_batch(job["vocabulary"], job["longest"])
    logprobs = trainer.logprobs(batch, "policy", 0)
    steps = [trainer.update(batch, step, 1) for step in range(STEPS)]
    if rank == 0:
        assert logprobs is not None
        queue.put((logprobs[batch["mask"]], [(step["loss"], step["grad_norm"]) for step in steps]))
    trainer.stop()


def run(job: Mapping[str, Any], world_size: int) -> Any:
    """What rank 0 reports, or None if a rank failed."""
    processes = multiprocessing.get_context("spawn")
    queue = processes.Queue()
    with tempfile.TemporaryDirectory() as folder:
        told = {**job, "address": f"file://{folder}/meeting"}
        ranks = [processes.Process(target=run_rank, args=(told, rank, world_size, queue)) for rank in range(world_size)]
        for rank in ranks:
            rank.start()
        try:
            for _ in range(150):
                with contextlib.suppress(Empty):
                    return queue.get(timeout=1)
                if any(rank.exitcode for rank in ranks):  # its traceback is on the terminal
                    return None
            return None
        finally:
            for rank in ranks:
                rank.join(20)
                rank.kill()


def compare(name: str, found: Any, reference: Any) -> None:
    """Prints a line of relative differences."""
    if found is None:
        print(f"  {name}: FAILED", flush=True)
        return
    worst = float(np.abs(found[0] - reference[0]).max())
    mean = float(np.abs(found[0] - reference[0]).mean())
    parts = []
    for own, other in zip(found[1], reference[1], strict=True):
        parts.append(" ".join(f"{abs(a - b) / abs(b):.1e}" for a, b in zip(own, other, strict=True)))
    print(f"  {name}: |log-probability| mean {mean:.1e} max {worst:.1e}; loss, norm by step: {' | '.join(parts)}")


def main() -> None:
    """Prints a line per layout and precision."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu-tiny", action="store_true", help="a tiny model on the CPU: only to see that it runs")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    arguments = parser.parse_args()
    tiny = arguments.cpu_tiny
    shape = {**MODEL, **TINY} if tiny else dict(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        base = {
            "model": folder,
            "gpus": 0 if tiny else 1,
            "vocabulary": shape["vocab_size"],
            "longest": 40 if tiny else 600,
            "tokens": 256 if tiny else 4096,
        }
        for precision, (transformer, parallel) in PRECISIONS.items():
            if tiny and parallel:
                continue
            job = {**base, "transformer": dict(transformer), "parallel": dict(parallel)}
            with ThreadPoolExecutor(1 if tiny else 4) as pool:
                first = pool.submit(run, job, 1)
                others = {"one rank, half the micro-batch": pool.submit(run, {**job, "tokens": job["tokens"] // 2}, 1)}
                for layout in arguments.layouts.split(","):
                    others[layout] = pool.submit(run, {**job, "parallel": {**parallel, **LAYOUTS[layout]}}, 2)
                reference = first.result()
                print(f"{precision}: one rank: loss and norm by step {reference[1]}", flush=True)
                for name, found in others.items():
                    compare(name, found.result(), reference)


if __name__ == "__main__":
    main()
