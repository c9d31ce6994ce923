"""Megatron's configuration objects, from a run's options and the family's description of the model.

Each field comes from one of four places, the first that says something: what Miles must set; what config.json says of
the model; the run file; what Miles defaults to. The run file against one of the first two is an error.
"""

from __future__ import annotations

import enum
import typing
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from torch.nn import functional as F

from miles_core.errors import UserError, nearest
from miles_core.megatron import MegatronModel
from miles_megatron.layout import Layout, check_layout, check_model, default_implementation
from miles_megatron.options import TrainerOptions

_FUNCTIONS = {"silu": F.silu}
_LR = 1e-6


def transformer(options: TrainerOptions, model: MegatronModel, world_size: int) -> Any:
    """The `TransformerConfig` of the run. Raises `UserError` for a layout that does not fit."""
    layout = Layout.of(options.parallel)
    check_model(options, model)
    check_layout(layout, model, world_size, options)
    half = bool(options.parallel.get("bf16", False))
    dtype = torch.bfloat16 if half else torch.float32
    fields = {
        **_defaults(model, options.transformer.get("transformer_impl", default_implementation())),
        **options.transformer,
        **options.parallel,
        **model.transformer,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": half,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,
        "perform_initialization": False,
        "deallocate_pipeline_outputs": True,
    }
    if not model.transformer.get("multi_latent_attention"):
        fields = {name: value for name, value in fields.items() if name not in _latent_only()}
    fields["activation_func"] = _FUNCTIONS[fields["activation_func"]]
    cls = MLATransformerConfig if model.transformer.get("multi_latent_attention") else TransformerConfig
    config = _built(cls, fields, "transformer")
    if config.virtual_pipeline_model_parallel_size != layout.virtual:
        raise UserError(
            "trainer.transformer.pipeline_model_parallel_layout gives each rank "
            f"{config.virtual_pipeline_model_parallel_size} stages; say so by "
            "trainer.parallel.virtual_pipeline_model_parallel_size, too"
        )
    return config


def _latent_only() -> set[str]:
    return set(MLATransformerConfig.__dataclass_fields__) - set(TransformerConfig.__dataclass_fields__)


def _defaults(model: MegatronModel, implementation: str) -> dict[str, Any]:
    """What holds unless the run file says otherwise."""
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "transformer_impl": implementation,
        "use_cpu_initialization": not cuda,
        "attention_softmax_in_fp32": True,
        "moe_token_dispatcher_type": "alltoall",  # the only one for micro-batches that differ in length
        **model.defaults,
    }
    if "num_moe_experts" in model.transformer:
        found["moe_grouped_gemm"] = implementation == "transformer_engine"
    if cuda:
        fused = implementation == "transformer_engine"
        found |= {
            "bias_activation_fusion": True,
            "apply_rope_fusion": fused,
            "gradient_accumulation_fusion": fused,
        }
    return found


def ddp(options: TrainerOptions) -> DistributedDataParallelConfig:
    """How gradients are summed. The distributed optimizer is on unless the run file says otherwise."""
    fields = {"use_distributed_optimizer": True, "grad_reduce_in_fp32": True, **options.ddp}
    return _built(DistributedDataParallelConfig, fields, "ddp")


def optimizer(options: TrainerOptions, reduction: DistributedDataParallelConfig) -> OptimizerConfig:
    """The optimizer of a stage."""
    half = bool(options.parallel.get("bf16", False))
    fields = {
        "lr": _LR,
        **options.optimizer,
        "bf16": half,
        "params_dtype": torch.bfloat16 if half else torch.float32,
        "use_distributed_optimizer": reduction.use_distributed_optimizer,
    }
    return _built(OptimizerConfig, fields, "optimizer")


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
"""As Megatron's own command line calls them."""


def _typed(cls: type[Any], name: str, value: Any) -> Any:
    """A value of a run file as the class wants it: types and members of enumerations go by their names there."""
    hint = typing.get_type_hints(cls).get(name) if isinstance(value, str) else None
    kinds = [hint, *typing.get_args(hint)]
    known: dict[str, Any] = dict(_DTYPES) if torch.dtype in kinds else {}
    for kind in kinds:
        if isinstance(kind, enum.EnumMeta):
            known |= kind.__members__
    if not known or (value not in known and str in kinds):
        return value
    if value not in known:
        raise ValueError(f"{name} has no {value!r}. {nearest(value, known)}")
    return known[value]


def _built(cls: type[Any], fields: Mapping[str, Any], section: str) -> Any:
    """Megatron's own checks, as errors that say where to look."""
    try:
        return cls(**{name: _typed(cls, name, value) for name, value in fields.items()})
    except (AssertionError, TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"[trainer.{section}]: Megatron-core refuses this: {error}") from error
