"""How ranks are divided, and which divisions are refused: before a process is started, without importing Megatron.

Some of them Megatron would accept and train wrongly without a word; each was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miles_core.errors import UserError
from miles_core.megatron import MegatronModel
from miles_megatron import surface
from miles_megatron.options import TrainerOptions
from miles_megatron.tensors import check_folder


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

    def __str__(self) -> str:
        virtual = f" x virtual {self.virtual}" if self.virtual else ""
        expert = f", expert tensor {self.expert_tensor} x expert {self.expert}"
        return f"tensor {self.tensor} x pipeline {self.pipeline}{virtual} x context {self.context}{expert}"

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


def check_run(
    options: TrainerOptions,
    config: Mapping[str, Any],
    description: MegatronModel,
    world_size: int,
    policy: TrainerOptions | None = None,
    folder: Path | None = None,
) -> None:
    """Refuses a run before it starts; see `miles_core.roles.TrainerCheck`. Raises `UserError`."""
    check_model(options, description)
    layout = Layout.of(options.parallel)
    check_layout(layout, description, world_size, options)
    if policy is not None and layout != Layout.of(policy.parallel):
        raise UserError(
            f"critic.parallel divides the ranks into {layout}, but the policy's trainer, on the same ranks, "
            f"into {Layout.of(policy.parallel)}; leave it out, or give the critic ranks of its own (critic.gpus)"
        )
    if folder is not None and any(folder.glob("*.safetensors")):
        check_folder(folder, description.predicting(further_layers(options, description)))


def check_model(options: TrainerOptions, model: MegatronModel) -> None:
    """Refuses options that contradict config.json. Raises `UserError`."""
    for name, value in options.transformer.items():
        if name in model.transformer and model.transformer[name] != value:
            raise UserError(
                f"trainer.transformer.{name} is {value!r}, but the model's config.json says "
                f"{model.transformer[name]!r}; leave it out"
            )
        if name in _ARCHITECTURE and name not in {**model.transformer, **model.defaults}:
            raise UserError(
                f"trainer.transformer.{name} makes another model than config.json describes, which does not say it; "
                "leave it out"
            )
        if _for_latent(name) and not model.transformer.get("multi_latent_attention"):
            raise UserError(f"trainer.transformer.{name} is for multi-latent attention, which this model does not have")
    further_layers(options, model)


_ARCHITECTURE = frozenset(
    {
        "activation_func_clamp_value",
        "add_bias_linear",
        "add_qkv_bias",
        "apply_residual_connection_post_layernorm",
        "attention_output_gate",
        "experimental_attention_variant",
        "ffn_hidden_size",
        "gated_linear_unit",
        "glu_linear_offset",
        "heterogeneous_block_specs",
        "kv_channels",
        "layernorm_zero_centered_gamma",
        "linear_attention_freq",
        "moe_apply_probs_on_input",
        "moe_ffn_hidden_size",
        "moe_latent_size",
        "moe_layer_freq",
        "moe_mlp_glu_interleave_size",
        "moe_router_enable_expert_bias",
        "moe_router_group_topk",
        "moe_router_num_groups",
        "moe_router_pre_softmax",
        "moe_router_score_function",
        "moe_router_topk",
        "moe_router_topk_limited_devices",
        "moe_router_topk_scaling_factor",
        "moe_shared_expert_gate",
        "moe_shared_expert_glu_interleave_size",
        "moe_shared_expert_intermediate_size",
        "mrope_section",
        "no_rope_freq",
        "normalization",
        "num_moe_experts",
        "num_query_groups",
        "qk_l2_norm",
        "qk_layernorm",
        "rotary_interleaved",
        "rotary_percent",
        "softmax_scale",
        "softmax_type",
        "window_attn_skip_freq",
        "window_size",
    }
)
"""What makes another model, whether config.json mentions it or not."""


def _for_latent(name: str) -> bool:
    return surface.fields("transformer")[name].owner == "MLATransformerConfig"


def further_layers(options: TrainerOptions, model: MegatronModel) -> int:
    """How many layers that predict further tokens a run takes. Raises `UserError` if the model has fewer."""
    wanted = int(options.transformer.get("mtp_num_layers") or 0)
    found = len(model.predictions)
    if wanted > found and not (found and options.transformer.get("mtp_use_repeated_layer")):
        raise UserError(
            f"trainer.transformer.mtp_num_layers is {wanted}, but the model's config.json says that it has {found} "
            "layers which predict further tokens (num_nextn_predict_layers)"
        )
    if wanted and options.transformer.get("pipeline_model_parallel_layout"):
        raise UserError(
            "trainer.transformer.pipeline_model_parallel_layout cannot be set with mtp_num_layers: layers that predict "
            "further tokens stand on the last stage"
        )
    return 1 if wanted and options.transformer.get("mtp_use_repeated_layer") else wanted


def check_layout(layout: Layout, model: MegatronModel, world_size: int, options: TrainerOptions) -> None:
    """Refuses what cannot be divided and what Megatron would train wrongly without a word. Raises `UserError`."""
    _check_sizes(options.parallel)
    _check_ranks(layout, world_size)
    _check_model(layout, model, options)
    _check_traps(layout, model, options)


_LEAST = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": 2,  # with 1 Megatron would run a schedule for several chunks on one
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
}


def _check_sizes(parallel: Mapping[str, Any]) -> None:
    for name, least in _LEAST.items():
        size = parallel.get(name)
        if size is not None and size < least:
            raise UserError(f"trainer.parallel.{name} must be at least {least}, got {size}; set it so, or leave it out")


def _check_ranks(layout: Layout, world_size: int) -> None:
    dense = layout.tensor * layout.pipeline * layout.context
    if world_size % dense:
        raise UserError(
            f"trainer.parallel: tensor_model_parallel_size {layout.tensor} x pipeline_model_parallel_size "
            f"{layout.pipeline} x context_parallel_size {layout.context} = {dense} does not divide the {world_size} "
            "ranks; trainer.gpus (or trainer.ranks) must be a multiple of it"
        )
    sparse = layout.expert_tensor * layout.expert * layout.pipeline
    if world_size % sparse:
        raise UserError(
            f"trainer.parallel: expert_tensor_parallel_size {layout.expert_tensor} x expert_model_parallel_size "
            f"{layout.expert} x pipeline_model_parallel_size {layout.pipeline} = {sparse} does not divide the "
            f"{world_size} ranks; trainer.gpus (or trainer.ranks) must be a multiple of it"
        )


_UNEVEN = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
"""Fields that divide layers unevenly over stages; whether they fit is Megatron's to say."""


def _check_model(layout: Layout, model: MegatronModel, options: TrainerOptions) -> None:
    said = model.transformer
    uneven = any(options.transformer.get(name) for name in _UNEVEN)
    heads, groups = said["num_attention_heads"], said.get("num_query_groups") or said["num_attention_heads"]
    wholes = [
        (heads, "attention heads", layout.tensor, "tensor_model_parallel_size"),
        (max(groups, layout.tensor), "key-value heads", min(groups, layout.tensor), "tensor_model_parallel_size"),
        (said.get("ffn_hidden_size", 0), "columns of an MLP", layout.tensor, "tensor_model_parallel_size"),
        (said.get("num_moe_experts") or 0, "experts", layout.expert, "expert_model_parallel_size"),
        (
            said.get("moe_ffn_hidden_size") or 0, "columns of an expert", layout.expert_tensor,
            "expert_tensor_parallel_size",
        ),
    ]  # fmt: skip
    if not uneven:
        stages = layout.pipeline * (layout.virtual or 1)
        wholes.append((said["num_layers"], "layers", stages, "pipeline_model_parallel_size"))
    for count, what, parts, name in wholes:
        if count % parts:
            count, parts = (groups, layout.tensor) if what == "key-value heads" else (count, parts)
            raise UserError(f"trainer.parallel.{name}: the model's {count} {what} cannot be divided by {parts}")


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
    if layout.tensor == 1 and options.parallel.get("sequence_parallel"):
        raise UserError("trainer.parallel.sequence_parallel needs tensor_model_parallel_size above 1; set it to false")
    _check_virtual(layout, options)
    _check_precision(options)
    if experts:
        _check_routing({**model.defaults, **options.transformer})


def _check_virtual(layout: Layout, options: TrainerOptions) -> None:
    overlaps = bool(options.parallel.get("overlap_p2p_comm"))
    if overlaps and (layout.virtual is None or options.parallel.get("batch_p2p_comm", True)):
        raise UserError(
            "trainer.parallel.overlap_p2p_comm is for virtual pipelines (virtual_pipeline_model_parallel_size) and "
            "needs batch_p2p_comm = false"
        )
    if layout.virtual is None:
        return
    if layout.pipeline < 2:
        raise UserError("trainer.parallel.virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size >= 2")
    if layout.pipeline == 2 and not overlaps:
        raise UserError(
            "trainer.parallel: a virtual pipeline on two stages trains silently wrong unless overlap_p2p_comm = true "
            "and batch_p2p_comm = false; set these"
        )


_ROUTED_TOGETHER = {
    "moe_expert_capacity_factor": "drops tokens by what else is in their micro-batch",
    "moe_input_jitter_eps": "routes the same tokens in another way each time",
    "moe_router_force_load_balancing": "routes tokens at random",
    "moe_router_force_biased": "routes tokens at random",
}
_BALANCED_TOGETHER = ("aux_loss", "global_aux_loss", "sinkhorn", "quantile_balancing")


def _check_routing(fields: Mapping[str, Any]) -> None:
    """Refuses what would make results depend on micro-batches, and a coefficient that Megatron would ignore."""
    for name, what in _ROUTED_TOGETHER.items():
        if fields.get(name):
            raise UserError(f"trainer.transformer.{name} cannot be set: it {what}")
    said = fields.get("moe_router_load_balancing_type", "none")
    kinds = [said] if isinstance(said, str) else list(said)
    coefficient = fields.get("moe_aux_loss_coeff") or 0.0
    coefficients = coefficient if isinstance(coefficient, list | tuple) else [coefficient] * len(kinds)
    wrong = [kind for kind in kinds if kind in _BALANCED_TOGETHER]
    if wrong or (any(coefficients) and "seq_aux_loss" not in kinds):
        why = f"{wrong[0]!r} depends on what is in a micro-batch" if wrong else f"{said!r} does not use it"
        raise UserError(
            "trainer.transformer.moe_aux_loss_coeff and moe_router_load_balancing_type: "
            f"{why}; set moe_router_load_balancing_type = 'seq_aux_loss', which balances each sample by itself"
        )


def _check_precision(options: TrainerOptions) -> None:
    implementation = options.transformer.get("transformer_impl", default_implementation())
    if implementation == "transformer_engine" and find_spec("transformer_engine") is None:
        raise UserError(
            "trainer.transformer.transformer_impl: Transformer Engine is not installed: "
            "pip install 'miles-megatron[te]'"
        )
    for name in ("fp8", "fp4"):
        if options.transformer.get(name) and implementation != "transformer_engine":
            raise UserError(
                f"trainer.transformer.{name} needs Transformer Engine, without which Megatron ignores it; "
                "install transformer-engine, or leave it out"
            )
