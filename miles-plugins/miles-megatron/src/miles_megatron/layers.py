"""Which modules a layer of the model is made of: the one place where that is chosen.

`transformer_impl`, Megatron's own option, says "transformer_engine" or "local"; by default it is the first where
Transformer Engine is installed. Both give parameters the same names, so that mapping tables and checkpoints fit both.
Megatron-core 0.19 calls GPTModel deprecated in favour of HybridModel, whose specification needs Transformer Engine:
this module, and `miles_megatron.model.build` which calls GPTModel, are what would change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs as megatron_specs
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from miles_core.errors import UserError
from miles_core.megatron import MegatronModel
from miles_megatron import local


def block(config: Any, model: MegatronModel, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, with a family's own modules in their places."""
    if config.transformer_impl == "transformer_engine":
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    else:
        spec = _local_block(config, vp_stage)
    spec = copy.copy(spec)
    specs = spec.layer_specs
    if config.num_moe_experts is not None:
        specs = _with_modules(specs, {"mlp.router": "miles_megatron.router:Router"}, mixed=True)
    specs = _with_modules(specs, model.modules, mixed=config.num_moe_experts is not None)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    spec.layer_specs = [
        _with_modules([own], model.layers.get(number, {}), mixed=False)[0] for number, own in enumerate(specs, first)
    ]
    return spec


def predictions(config: Any, spec: TransformerBlockSubmodules, vp_stage: int | None = None) -> Any:
    """The layers that predict further tokens, which are made as the last layer is; None on all but the last stage."""
    if config.transformer_impl == "transformer_engine":
        return get_gpt_mtp_block_spec(config, spec, use_transformer_engine=True, vp_stage=vp_stage)
    return get_gpt_mtp_block_spec_for_backend(config, spec, backend=local.LocalBackend(), vp_stage=vp_stage)


def backend(config: Any) -> Any:
    """The modules that layers are made of, for modules of a family that contain some of them."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return local.LocalBackend()


def _local_block(config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    backend = local.LocalBackend()
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    own = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    sparse = _sparse(config)
    layers = [_local_layer(config, backend, config.num_moe_experts if sparse[layer] else None) for layer in own]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=local.RMSNorm)


def _sparse(config: Any) -> list[int]:
    """1 for each layer of the whole model that has experts."""
    if config.num_moe_experts is None:
        return [0] * config.num_layers
    pattern: int | list[int] = config.moe_layer_freq
    if isinstance(pattern, list):
        return pattern
    return [int(layer % pattern == 0) for layer in range(config.num_layers)]


def _local_layer(config: Any, backend: local.LocalBackend, experts: int | None) -> ModuleSpec:
    """What Megatron builds of Transformer Engine's modules, built of ours."""
    make_attention = _latent_attention if config.multi_latent_attention else _attention
    latent = bool(config.multi_latent_attention)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=local.RMSNorm if latent else IdentityOp,
            self_attention=make_attention(config, backend),
            self_attn_bda=megatron_specs.get_bias_dropout_add,
            pre_mlp_layernorm=local.RMSNorm if experts else IdentityOp,
            mlp=get_mlp_module_spec_for_backend(backend=backend, num_experts=experts, moe_grouped_gemm=False),
            mlp_bda=megatron_specs.get_bias_dropout_add,
            sharded_state_dict_keys_map=LATENT_NORMS if latent else {},
        ),
    )


LATENT_NORMS = {
    f"self_attention.{kind}_layernorm.": f"self_attention.linear_{kind}_up_proj.layer_norm_" for kind in ("q", "kv")
}
"""Local name -> name in Transformer Engine's model: latent attention has its norms apart without it."""


def _attention(config: Any, backend: local.LocalBackend) -> ModuleSpec:
    norm = local.RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=megatron_specs.SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=megatron_specs.SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def _latent_attention(config: Any, backend: local.LocalBackend) -> ModuleSpec:
    plain = backend.column_parallel_linear()
    norm = local.RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=local.LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=megatron_specs.MLASelfAttentionSubmodules(
            linear_q_proj=plain,
            linear_q_down_proj=plain,
            linear_q_up_proj=plain,
            linear_kv_down_proj=plain,
            linear_kv_up_proj=plain,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )


def _with_modules(specs: list[ModuleSpec], modules: Mapping[str, str], *, mixed: bool) -> list[ModuleSpec]:
    """Layers with a family's own modules: "self_attention" or deeper, "self_attention.core_attention".

    mixed: layers may differ in what their MLP is made of, so that a stage may have no place for a module of it.
    """
    specs = [copy.deepcopy(spec) for spec in specs]
    for place, ref in modules.items():
        found = [_replace(spec, place, resolve_name(ref)) for spec in specs]
        if not any(found) and not (mixed and place.startswith("mlp.")):
            raise UserError(f"a layer of Megatron's model has no place {place!r} for a family's own module")
    return specs


def _replace(spec: Any, place: str, module: Any) -> bool:
    """Puts a module, or a specification of one, into its place; False if there is none."""
    *way, last = place.split(".")
    for name in way:
        spec = getattr(_submodules(spec), name, None)
    holder = _submodules(spec)
    if not hasattr(holder, last):
        return False
    old = getattr(holder, last)
    if isinstance(old, ModuleSpec) and not isinstance(module, ModuleSpec):
        old.module = module
    else:
        setattr(holder, last, module)
    return True


def _submodules(spec: Any) -> Any:
    """Of a `ModuleSpec`, or of a function that builds a module with its submodules already given."""
    if isinstance(spec, ModuleSpec):
        return spec.submodules
    return getattr(spec, "keywords", {}).get("submodules")
