"""Miles plugin: the engine on SGLang, and the weight syncs that lead to it."""

from __future__ import annotations

from collections.abc import Iterable

from miles_core import EngineSpec, WeightSyncSpec, hookimpl


@hookimpl
def miles_engines() -> Iterable[EngineSpec]:
    """The engine `sglang`."""
    yield EngineSpec(
        name="sglang",
        ref="miles_sglang.engine:SglangEngine",
        options="miles_sglang.options:EngineOptions",
        extra="engine",
        pause_modes=frozenset({"drain", "abort", "retract", "in-place"}),
        flags="miles_sglang.flags:flags",
        summary="SGLang: one server a engine, started and ended with the run.",
    )


@hookimpl
def miles_weight_syncs() -> Iterable[WeightSyncSpec]:
    """From the trainers `torch` and `megatron`, disaggregated and colocated."""
    for trainer in ("torch", "megatron"):
        yield WeightSyncSpec(
            name=f"{trainer}-to-sglang",
            ref="miles_sglang.sync:Sender",
            receiver="miles_sglang.sync:Receiver",
            example="miles_sglang.examples:weight_sync",
            trainer=trainer,
            engine="sglang",
            summary="Broadcasts flat buckets from the trainer straight into the servers, by gloo or NCCL.",
        )
        yield WeightSyncSpec(
            name=f"{trainer}-to-sglang-handles",
            ref="miles_sglang.handles:Sender",
            receiver="miles_sglang.handles:Receiver",
            example="miles_sglang.examples:weight_sync",
            trainer=trainer,
            engine="sglang",
            layouts=frozenset({"colocated"}),
            summary="Lets servers read flat buckets in the trainer's own memory, by CUDA's handles or shared memory.",
        )
