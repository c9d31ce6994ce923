"""Miles plugin: the trainer on Megatron-core."""

from __future__ import annotations

from collections.abc import Iterable

from miles_core import CommandSpec, TrainerSpec, WeightSyncSpec, hookimpl


@hookimpl
def miles_trainers() -> Iterable[TrainerSpec]:
    """The trainer `megatron`."""
    yield TrainerSpec(
        name="megatron",
        ref="miles_megatron.start:make_trainer",
        options="miles_megatron.options:TrainerOptions",
        gives=frozenset({"old_logprobs", "ref_logprobs"}),
        top_logprobs=True,
        critic="miles_megatron.start:make_critic",
        families="listed",
        backend="megatron",
        extra="core",
        gpu_extra="te",
        check="miles_megatron.layout:check_run",
        flags="miles_megatron.flags:flags",
        summary="Megatron-core: tensor, pipeline, context, expert and data parallelism, for large models.",
    )


@hookimpl
def miles_weight_syncs() -> Iterable[WeightSyncSpec]:
    """The weight sync to the engine `torch`."""
    yield WeightSyncSpec(
        name="megatron-to-torch",
        ref="miles_torch.sync:TorchSender",
        receiver="miles_torch.sync:TorchReceiver",
        trainer="megatron",
        engine="torch",
        layouts=frozenset({"disaggregated", "colocated"}),
        summary="Broadcasts flat buckets over a process group of its own, gloo or NCCL.",
    )


@hookimpl
def miles_commands() -> Iterable[CommandSpec]:
    """`miles convert`."""
    yield CommandSpec(
        name="convert",
        ref="miles_megatron.commands:convert",
        summary="Converts weights between a Hugging Face folder and Megatron's distributed format.",
    )
