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
        pause_modes=frozenset({"drain", "abort", "retract", "in-place"}),
        summary="SGLang: one server a engine, started and ended with the run.",
    )


@hookimpl
def miles_weight_syncs() -> Iterable[WeightSyncSpec]:
    """The weight sync from the trainer `torch`."""
    yield WeightSyncSpec(
        name="torch-to-sglang",
        ref="miles_sglang.sync:Sender",
        receiver="miles_sglang.sync:Receiver",
        example="miles_sglang.examples:weight_sync",
        trainer="torch",
        engine="sglang",
        summary="Broadcasts flat buckets from the trainer straight into the servers, by gloo or NCCL.",
    )
