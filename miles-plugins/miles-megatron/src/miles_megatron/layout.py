"""How ranks are divided, and which divisions are refused: before a process is started, without importing Megatron.

Some of them Megatron would accept and train wrongly without a word; each was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from miles_core.errors import UserError
from miles_core.megatron import MegatronModel
from miles_megatron.options import TrainerOptions


def default_implementation() -> str:
    """What `transformer_impl` is if nobody says."""
    return "transformer_engine" if find_spec("transformer_engine") is not None else "local"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the ranks are divided. The product of tensor, pipeline and context divides the number of ranks; so does that
    of expert tensor, expert and pipeline."""

    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int
    virtual: int | None

    @classmethod
    def of(cls, parallel: Mapping[str, Any]) -> Layout:
        """From fields of `ModelParallelConfig`."""
        tensor = parallel.get("tensor_model_parallel_size", 1)
        return cls(
            tensor=tensor,
            pipeline=parallel.get("pipeline_model_parallel_size", 1),
            context=parallel.get("context_parallel_size", 1),
            expert=parallel.get("expert_model_parallel_size", 1),
            expert_tensor=parallel.get("expert_tensor_parallel_size") or tensor,
            virtual=parallel.get("virtual_pipeline_model_parallel_size"),
        )


def check_run(options: TrainerOptions, config: Mapping[str, Any], description: MegatronModel, world_size: int) -> None:
    """Refuses a run before it starts; see `miles_core.roles.TrainerCheck`. Raises `UserError`."""
    check_model(options, description)
    check_layout(Layout.of(options.parallel), description, world_size, options)


def check_model(options: TrainerOptions, model: MegatronModel) -> None:
    """Refuses options that contradict config.json. Raises `UserError`."""
    for name, value in options.transformer.items():
        if name in model.transformer and model.transformer[name] != value:
            raise UserError(
                f"trainer.transformer.{name} is {value!r}, but the model's config.json says "
                f"{model.transformer[name]!r}; leave it out"
            )


def check_layout(layout: Layout, model: MegatronModel, world_size: int, options: TrainerOptions) -> None:
    """Refuses what cannot be divided and what Megatron would train wrongly without a word. Raises `UserError`."""
    _check_ranks(layout, world_size)
    _check_model(layout, model)
    _check_traps(layout, model, options)


def _check_ranks(layout: Layout, world_size: int) -> None:
    dense = layout.tensor * layout.pipeline * layout.context
    if world_size % dense:
        raise UserError(
            f"trainer.parallel: tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} = "
            f"{dense} ranks do not divide the trainer's {world_size}"
        )
    sparse = layout.expert_tensor * layout.expert * layout.pipeline
    if layout.expert > 1 and world_size % sparse:
        raise UserError(
            f"trainer.parallel: expert tensor {layout.expert_tensor} x expert {layout.expert} x pipeline "
            f"{layout.pipeline} = {sparse} ranks do not divide the trainer's {world_size}"
        )


def _check_model(layout: Layout, model: MegatronModel) -> None:
    said = model.transformer
    stages = layout.pipeline * (layout.virtual or 1)
    wrong = {
        f"the model's {said['num_attention_heads']} attention heads": (
            said["num_attention_heads"], layout.tensor, "tensor_model_parallel_size"
        ),
        f"the model's {said['num_layers']} layers": (said["num_layers"], stages, "pipeline_model_parallel_size"),
    }  # fmt: skip
    if experts := said.get("num_moe_experts"):
        wrong[f"the model's {experts} experts"] = (experts, layout.expert, "expert_model_parallel_size")
    for what, (count, parts, name) in wrong.items():
        if count % parts:
            raise UserError(f"trainer.parallel.{name}: {what} cannot be divided by {parts}")


def _check_traps(layout: Layout, model: MegatronModel, options: TrainerOptions) -> None:
    experts = model.transformer.get("num_moe_experts")
    if experts is None and layout.expert > 1:
        raise UserError("trainer.parallel.expert_model_parallel_size is for models with experts; this one has none")
    if experts and layout.expert == 1 and layout.expert_tensor != layout.tensor:
        raise UserError(
            f"trainer.parallel.expert_tensor_parallel_size is {layout.expert_tensor}, unlike "
            f"tensor_model_parallel_size = {layout.tensor}: without expert parallelism Megatron would not sum the "
            "experts' gradients over those ranks; set both alike, or expert_model_parallel_size above 1"
        )
    latent = model.transformer.get("multi_latent_attention")
    if (experts or latent) and layout.tensor > 1 and not options.parallel.get("sequence_parallel"):
        kind = "experts" if experts else "latent attention"
        raise UserError(
            f"trainer.parallel.sequence_parallel must be true where a model with {kind} is tensor parallel: "
            "Megatron refuses or miscomputes anything else"
        )
    _check_virtual(layout, options)
    _check_precision(options)


def _check_virtual(layout: Layout, options: TrainerOptions) -> None:
    if layout.virtual is None:
        return
    if layout.pipeline < 2:
        raise UserError("trainer.parallel.virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size >= 2")
    if layout.pipeline == 2 and not options.parallel.get("overlap_p2p_comm"):
        raise UserError(
            "trainer.parallel: a virtual pipeline on two stages trains silently wrong unless overlap_p2p_comm = true "
            "and batch_p2p_comm = false; set these"
        )


def _check_precision(options: TrainerOptions) -> None:
    implementation = options.transformer.get("transformer_impl", default_implementation())
    for name in ("fp8", "fp4"):
        if options.transformer.get(name) and implementation != "transformer_engine":
            raise UserError(
                f"trainer.transformer.{name} needs Transformer Engine, without which Megatron ignores it; "
                "install transformer-engine, or leave it out"
            )
