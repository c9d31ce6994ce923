"""Miles plugin: the embedded default trainer and engine, for any transformers causal language model."""

from __future__ import annotations

from collections.abc import Iterable

from miles_core import CommandSpec, EngineSpec, TrainerSpec, WeightSyncSpec, hookimpl


@hookimpl
def miles_trainers() -> Iterable[TrainerSpec]:
    """The trainer `torch`."""
    yield TrainerSpec(
        name="torch",
        ref="miles_torch.trainer:TorchTrainer",
        options="miles_torch.options:TrainerOptions",
        gives=frozenset({"old_logprobs", "ref_logprobs"}),
        top_logprobs=True,
        critic="miles_torch.critic:TorchCritic",
        summary="Any transformers causal language model, on one CPU or on many GPUs through FSDP2.",
    )


@hookimpl
def miles_engines() -> Iterable[EngineSpec]:
    """The engine `torch`."""
    yield EngineSpec(
        name="torch",
        ref="miles_torch.engine:TorchEngine",
        options="miles_torch.engine_options:EngineOptions",
        features=frozenset({"seeds", "scores"}),
        pause_modes=frozenset({"drain", "abort", "retract", "in-place"}),
        summary="Continuous batched sampling of any transformers causal language model, from one CPU up.",
    )


@hookimpl
def miles_weight_syncs() -> Iterable[WeightSyncSpec]:
    """The weight sync between the two."""
    yield WeightSyncSpec(
        name="torch-to-torch",
        ref="miles_torch.sync:TorchSender",
        receiver="miles_torch.sync:TorchReceiver",
        trainer="torch",
        engine="torch",
        layouts=frozenset({"disaggregated", "colocated"}),
        summary="Broadcasts flat buckets over a process group of its own, gloo or NCCL.",
    )


@hookimpl
def miles_commands() -> Iterable[CommandSpec]:
    """`miles import-gguf`."""
    yield CommandSpec(
        name="import-gguf",
        ref="miles_torch.commands:import_gguf",
        summary="Writes the model of a GGUF file as a Hugging Face folder.",
    )
