"""Loss, gradient norm and log-probabilities of the trainer `megatron` under each layout of two or four ranks, against
one rank: of a dense model, a mixture of experts, and one with latent attention and experts.

In float32 with the trainer's own layers the numbers must agree to rounding; in bfloat16 with Transformer Engine, to
what bfloat16 can tell: one rank with other micro-batches is shown beside them for a measure.

    python benchmarks/megatron_layouts.py [--ranks 4] [--models NAME,...] [--layouts 'NAME;...'] [--cpu-tiny]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np

from miles_core.roles import LossInputs, LossOutputs, TrainerContext, TrainStage
from miles_core.sample import Batch, Sample

_SHARED: Mapping[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.05,
    "max_position_embeddings": 4096,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": 8,
        "moe_intermediate_size": 256,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
}
"""Name -> fields of config.json over the shared ones."""
TINY: Mapping[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
_SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2 sp": (2, _SEQUENCE),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2 sp pp2": (4, {**_SEQUENCE, "pipeline_model_parallel_size": 2}),
    "tp2 sp cp2": (4, {**_SEQUENCE, "context_parallel_size": 2}),
    "tp2 sp ep2": (4, {**_SEQUENCE, "expert_model_parallel_size": 2}),
    "tp2 sp ep2, each expert whole": (
        4, {**_SEQUENCE, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "pp2 ep2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
}  # fmt: skip
"""Name -> ranks, and how they are divided."""
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


def layouts_of(model: str, ranks: int, chosen: Sequence[str]) -> list[str]:
    """Those of the chosen ones that a model can have on so many ranks."""
    experts = model != "qwen3"
    found = []
    for name in chosen:
        needed, parallel = LAYOUTS[name]
        divides = "expert_model_parallel_size" in parallel
        if needed <= ranks and (not divides or experts) and not (name == "tp2" and experts):
            found.append(name)
    return found


def main() -> None:
    """Prints a line per model, precision and layout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu-tiny", action="store_true", help="tiny models on the CPU: only to see that it runs")
    parser.add_argument("--ranks", type=int, default=2, help="as many GPUs as there are: layouts of no more")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--layouts", default=";".join(LAYOUTS), help="divided by ;")
    arguments = parser.parse_args()
    for model in arguments.models.split(","):
        layouts = layouts_of(model, arguments.ranks, arguments.layouts.split(";"))
        measure(model, layouts, tiny=arguments.cpu_tiny)


def measure(model: str, layouts: Sequence[str], *, tiny: bool) -> None:
    """Prints a line per precision and layout of a model."""
    shape = {**_SHARED, **MODELS[model], **(TINY if tiny else {})}
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
                for layout in layouts:
                    ranks, divided = LAYOUTS[layout]
                    others[layout] = pool.submit(run, {**job, "parallel": {**parallel, **divided}}, ranks)
                reference = first.result()
                print(f"{model}, {precision}: one rank: loss and norm by step {reference[1]}", flush=True)
                for name, found in others.items():
                    compare(name, found.result(), reference)


if __name__ == "__main__":
    main()
