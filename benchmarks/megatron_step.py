"""A step of the trainer `megatron` against a bare Megatron-core loop, on one GPU in bfloat16.

Forward, backward and optimizer; random weights of the shape of Qwen3-0.6B, the same on all sides; 16,384 tokens packed
from 16 sequences, in one pass.
The sides take turns; ratios are medians of each round's. "bare" is GPTModel with Transformer Engine and Megatron's own
defaults; "bare, fused" has its fused rotary embedding, activation and cross-entropy switched on. Megatron's
distributed optimizer, gradients and main weights in float32 everywhere.

The share of the peak counts 6 floating-point operations per parameter and token (the embedding once, as the output
layer) and the causal half of attention.

    python benchmarks/megatron_step.py [--rounds 15] [--profile FOLDER] [--cpu-tiny]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from miles_core.roles import LossInputs, LossOutputs, TrainerContext, TrainStage
from miles_core.sample import Batch, Sample
from miles_megatron.options import TrainerOptions
from miles_megatron.start import make_trainer, prepare

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
PEAK = 989e12
"""Dense bfloat16 floating-point operations a second, by the datasheet of the H100 and H200."""

Step = Callable[[], float]


def loss(inputs: LossInputs, options: None) -> LossOutputs:
    """The negative log-likelihood, as the bare loop has it."""
    return LossOutputs(losses=-inputs.logprobs)


def make_batch(shape: dict[str, Any], sequences: int, length: int) -> Batch:
    """Sequences of `length` tokens that are read, and one more that is predicted."""
    rng = np.random.default_rng(0)
    made = []
    for group in range(sequences):
        tokens = rng.integers(0, shape["vocab_size"], length + 1).astype(np.int32)
        made.append(
            Sample(
                group=group,
                index=0,
                prompt=tokens[:1],
                response=tokens[1:],
                mask=np.ones(length, np.bool_),
                logprobs=np.full(length, -12, np.float32),
                versions=np.full(length, -1, np.int32),
                status="completed",
                text="",
                reward=0.0,
            )
        )
    batch = Batch.pack(made)
    return batch.with_columns(weights=batch["mask"] / batch["mask"].sum())


def miles_side(folder: Path, batch: Batch, device: str, extra: dict[str, Any]) -> tuple[Step, Any]:
    """`update` with one batch, and the trainer."""
    optimizer = {"lr": 1e-5, "weight_decay": 0.01, "clip_grad": 1.0}
    options = TrainerOptions(**{"optimizer": optimizer, "parallel": {"bf16": device == "cuda"}, **extra})
    context = TrainerContext(
        model=folder,
        rank=0,
        world_size=1,
        address=f"file://{folder}/meeting",
        gpus=int(device == "cuda"),
        threads=8,
        seed=0,
        reference=False,
        timeout_s=120,
    )
    trainer = make_trainer(options, context)
    trainer.start()
    trainer.begin(
        TrainStage(
            name="bench",
            loss=loss,
            loss_options=None,
            entropy=False,
            needs=frozenset(),
            optimizer_steps=1000,
            options=options,
        )
    )
    return lambda: float(trainer.update(batch, 0, 1)["loss"]), trainer


def bare_config(shape: dict[str, Any], device: str, fused: bool) -> Any:
    """Megatron's configuration of the model, with its defaults or with what it can fuse."""
    from megatron.core.transformer import TransformerConfig

    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    more: dict[str, Any] = {
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "te",
    }
    return TransformerConfig(
        num_layers=shape["num_hidden_layers"],
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["intermediate_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_query_groups=shape["num_key_value_heads"],
        kv_channels=shape["head_dim"],
        normalization="RMSNorm",
        layernorm_epsilon=shape["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=cuda,
        params_dtype=dtype,
        transformer_impl="transformer_engine" if cuda else "local",
        **(more if fused and cuda else {}),
    )


def bare_model(shape: dict[str, Any], config: Any, source: Any, device: str) -> Any:
    """GPTModel with the trainer's weights, wrapped for training."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    from miles_megatron import layers

    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=layers.block(config, source._model),
        vocab_size=shape["vocab_size"],
        max_sequence_length=shape["max_position_embeddings"],
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=int(shape["rope_theta"]),
    ).to(device)
    model.load_state_dict(source._bare.state_dict(), strict=False)
    if config.bf16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, ddp, model)


def bare_side(shape: dict[str, Any], batch: Batch, source: Any, device: str, *, fused: bool) -> Step:
    """What Megatron's own pre-training loop does with one micro-batch."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = bare_config(shape, device, fused)
    model = bare_model(shape, config, source, device)
    settings = OptimizerConfig(
        lr=1e-5, weight_decay=0.01, clip_grad=1.0, bf16=config.bf16, params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, [model])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    length = int(batch.lengths[0]) - 1
    table = torch.from_numpy(batch["tokens"].astype(np.int64)).view(len(batch), length + 1).to(device)
    tokens, labels = table[:, :-1].reshape(1, -1), table[:, 1:].reshape(1, -1)
    positions = torch.arange(length, device=device).repeat(len(batch))[None]
    bounds = torch.arange(len(batch) + 1, dtype=torch.int32, device=device) * length
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=length, max_seqlen_kv=length
    )

    def forward(_: Any, chunk: Any) -> Any:
        losses = chunk(tokens, positions, None, labels=labels, packed_seq_params=packed)
        return losses, lambda output: (output.float().mean(), {"loss": output.detach().float().mean()})

    def step() -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=None, model=model, num_microbatches=1,
            seq_length=tokens.numel(), micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        return float(found[0]["loss"])

    return step


def measure(sides: dict[str, Step], rounds: int, synchronize: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of each round of each side, taking turns, after three rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 3):
        for name, step in sides.items():
            synchronize()
            started = time.perf_counter()
            step()
            synchronize()
            if number >= 3:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def busy(events: Any) -> float:
    """Seconds in which the GPU did anything, of a profile."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if str(e.device_type).endswith("CUDA"))
    total, reached = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def profile(sides: dict[str, Step], folder: Path) -> None:
    """One step of each side: where the time of GPU and host goes, into files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, step in sides.items():
        with torch.profiler.profile() as profiler:
            step()
            torch.cuda.synchronize()
        events = profiler.events()
        tables = [
            profiler.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=90)
            for key in ("self_cuda_time_total", "self_cpu_time_total")
        ]
        kernels = sum(str(e.device_type).endswith("CUDA") for e in events)
        line = f"{name}: the GPU is busy for {busy(events) * 1e3:.0f} ms with {kernels} kernels and copies"
        print(line)
        (folder / f"{name.replace(', ', '-')}.txt").write_text("\n".join([line, *tables]))


def flops_per_token(shape: dict[str, Any], length: int) -> float:
    """Of forward and backward pass."""
    heads, width = shape["num_attention_heads"], shape["head_dim"]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    attention = hidden * width * (2 * heads + 2 * shape["num_key_value_heads"])
    layer = 6 * (attention + 3 * hidden * inner) + 6 * heads * width * length
    return float(shape["num_hidden_layers"] * layer + 6 * hidden * shape["vocab_size"])


def sleep(trainer: Any) -> None:
    """What the trainer's sleep gives back of the GPU's memory, and how long it and waking take."""

    def used() -> float:
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    torch.cuda.empty_cache()
    before = used()
    spent = []
    for change in (trainer.sleep, trainer.wake, trainer.sleep):
        torch.cuda.synchronize()
        started = time.perf_counter()
        change()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    print(f"GPU memory in use: awake {before:.2f} GiB, asleep {used():.2f} GiB")
    print(f"seconds: first sleep {spent[0]:.2f}, waking {spent[1]:.2f}, second sleep {spent[2]:.2f}")
    trainer.wake()


def main() -> None:
    """Prints a line per side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--cpu-tiny", action="store_true", help="a tiny model on the CPU: only to see that it runs")
    parser.add_argument("--options", type=json.loads, default={}, help="more of [trainer], as JSON")
    parser.add_argument("--sides", default="miles,bare,bare-fused")
    arguments = parser.parse_args()
    device, shape = ("cpu", {**SHAPE, **TINY}) if arguments.cpu_tiny else ("cuda", dict(SHAPE))
    sequences, length = (4, 32) if arguments.cpu_tiny else (16, 1024)
    prepare()
    batch = make_batch(shape, sequences, length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(shape))
        step, trainer = miles_side(folder, batch, device, arguments.options)
        sides = {"miles": step}
        wanted = arguments.sides.split(",")
        for side in ("bare", "bare-fused"):
            if side in wanted:
                sides[side] = bare_side(shape, batch, trainer, device, fused=side == "bare-fused")
        values = {name: step() for name, step in sides.items()}
        print("first losses", values)
        assert max(values.values()) - min(values.values()) < 2e-3 * values["miles"], "they do not compute the same"
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        seconds = measure(sides, arguments.rounds, synchronize)
        tokens = sequences * length
        for name, own in seconds.items():
            median = statistics.median(own)
            share = flops_per_token(shape, length) * tokens / median / PEAK
            ratio = statistics.median(other / mine for other, mine in zip(own, seconds["miles"], strict=True))
            print(
                f"{name}: {median * 1e3:.0f} ms, {tokens / median:,.0f} tokens/s, {share:.1%} of the peak, "
                f"{ratio:.2f} times the time of miles"
            )
        if device == "cuda":
            print(f"most memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
            if arguments.profile:
                profile(sides, arguments.profile)
            if len(sides) == 1:
                loss_before = sides["miles"]()
                sleep(trainer)
                print(f"loss before {loss_before:.5f} and after {sides['miles']():.5f}")
        trainer.stop()


if __name__ == "__main__":
    main()
