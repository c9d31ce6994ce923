"""How a model family stands in Megatron-core: its configuration, and where each Hugging Face tensor goes.

For authors of model plugins. A family describes itself in data alone: a `MegatronModel` names fields of Megatron's own
configuration and holds one `Weight` for each kind of parameter. The same table serves loading, export to an engine and
saving, so none of them can drift from the others. Imports nothing heavy.

Megatron's parameters go by the names that they have in a model of Transformer Engine modules, with the numbers of
layers and experts counted over the whole model:

    decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight
    decoder.layers.{layer}.mlp.experts.linear_fc1.weight{expert}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from miles_core import families

Join = Literal["copy", "qkv", "gate_up"]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One kind of parameter. megatron: its name in Megatron; hf: names of the tensors that it is made of, in order.

    Both may hold {layer} and {expert}. join: "copy" of one tensor; "qkv", query, key and value, heads of one
    key-value group side by side; "gate_up", gate above up.
    """

    megatron: str
    hf: tuple[str, ...]
    join: Join = "copy"

    def __post_init__(self) -> None:
        wanted = {"copy": 1, "qkv": 3, "gate_up": 2}[self.join]
        if len(self.hf) != wanted:
            raise ValueError(f"{self.megatron}: join {self.join!r} takes {wanted} tensors, got {len(self.hf)}")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches a parameter's full name, with groups `layer` and `expert` where it has them."""
        return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(self.megatron)))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A layer that predicts one token further than the layers before it (multi-token prediction).

    weights: of its parameters. copies: tensor that a Hugging Face folder may hold besides -> the parameter of the model
    that it is a copy of.
    """

    weights: tuple[Weight, ...]
    copies: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class MegatronModel:
    """A model of a family, for Megatron-core.

    transformer: fields of `TransformerConfig` (`MLATransformerConfig` if `multi_latent_attention` is true) that the
    model's config.json decides; functions by name ("silu"). defaults: fields that a run may set otherwise.
    gpt: arguments of `GPTModel`. weights: each parameter matches exactly one. ignored: regular expressions of tensors
    that a Hugging Face folder may hold beside them. predictions: layers beyond the last one, in order, of which a run
    takes as many as it says as `mtp_num_layers`. copies: as in `Prediction`, of those it takes. modules: place in a
    layer of the model -> "module:name" of what stands there instead of Megatron's, such as "self_attention" ->
    "acme.attention:Gated": a torch module, or a `ModuleSpec` of Megatron's with submodules of its own. layers: number
    of a layer, from 0 -> the same for that layer alone.
    """

    transformer: Mapping[str, Any]
    weights: tuple[Weight, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    gpt: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[int, Mapping[str, str]] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.gpt.get("share_embeddings_and_output_weights", False))

    def predicting(self, layers: int) -> MegatronModel:
        """The same with the first `layers` of `predictions` among its weights."""
        taken = self.predictions[:layers]
        return replace(
            self,
            weights=(*self.weights, *(weight for layer in taken for weight in layer.weights)),
            copies={name: parameter for layer in taken for name, parameter in layer.copies.items()},
        )


# ---- Parts of tables ------------------------------------------------------------------------------------------------

_M, _H = "decoder.layers.{layer}.", "model.layers.{layer}."

EMBEDDING = (
    Weight(megatron="embedding.word_embeddings.weight", hf=("model.embed_tokens.weight",)),
    Weight(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",)),
)
"""Embedding and final norm."""

HEAD = (Weight(megatron="output_layer.weight", hf=("lm_head.weight",)),)
"""An output layer of its own, for models that do not tie it to the embedding."""


def _qkv(kind: str) -> Weight:
    names = tuple(f"{_H}self_attn.{part}_proj.{kind}" for part in "qkv")
    return Weight(megatron=f"{_M}self_attention.linear_qkv.{kind}", hf=names, join="qkv")


ATTENTION = (
    Weight(megatron=f"{_M}self_attention.linear_qkv.layer_norm_weight", hf=(f"{_H}input_layernorm.weight",)),
    _qkv("weight"),
    Weight(megatron=f"{_M}self_attention.linear_proj.weight", hf=(f"{_H}self_attn.o_proj.weight",)),
)
"""Grouped-query attention with the norm before it."""

QKV_BIAS = (_qkv("bias"),)
"""Biases of query, key and value."""

QK_NORM = (
    Weight(megatron=f"{_M}self_attention.q_layernorm.weight", hf=(f"{_H}self_attn.q_norm.weight",)),
    Weight(megatron=f"{_M}self_attention.k_layernorm.weight", hf=(f"{_H}self_attn.k_norm.weight",)),
)
"""A norm of each head of query and key."""


_LATENT, _PROJECTED = f"{_M}self_attention.linear_", f"{_H}self_attn."
LATENT_ATTENTION = (
    Weight(megatron=f"{_M}input_layernorm.weight", hf=(f"{_H}input_layernorm.weight",)),
    Weight(megatron=f"{_LATENT}kv_down_proj.weight", hf=(f"{_PROJECTED}kv_a_proj_with_mqa.weight",)),
    Weight(megatron=f"{_LATENT}kv_up_proj.layer_norm_weight", hf=(f"{_PROJECTED}kv_a_layernorm.weight",)),
    Weight(megatron=f"{_LATENT}kv_up_proj.weight", hf=(f"{_PROJECTED}kv_b_proj.weight",)),
    Weight(megatron=f"{_LATENT}q_down_proj.weight", hf=(f"{_PROJECTED}q_a_proj.weight",)),
    Weight(megatron=f"{_LATENT}q_up_proj.layer_norm_weight", hf=(f"{_PROJECTED}q_a_layernorm.weight",)),
    Weight(megatron=f"{_LATENT}q_up_proj.weight", hf=(f"{_PROJECTED}q_b_proj.weight",)),
    Weight(megatron=f"{_LATENT}proj.weight", hf=(f"{_PROJECTED}o_proj.weight",)),
)
"""Attention through narrow layers with norms of their own, and the norm before it."""


def _gated(megatron: str, hf: str, expert: str = "") -> tuple[Weight, ...]:
    return (
        Weight(
            megatron=f"{_M}{megatron}linear_fc1.weight{expert}",
            hf=(f"{_H}{hf}gate_proj.weight", f"{_H}{hf}up_proj.weight"),
            join="gate_up",
        ),
        Weight(megatron=f"{_M}{megatron}linear_fc2.weight{expert}", hf=(f"{_H}{hf}down_proj.weight",)),
    )


MLP = (
    Weight(megatron=f"{_M}mlp.linear_fc1.layer_norm_weight", hf=(f"{_H}post_attention_layernorm.weight",)),
    *_gated("mlp.", "mlp."),
)
"""A gated MLP with the norm before it."""

EXPERTS = (
    Weight(megatron=f"{_M}pre_mlp_layernorm.weight", hf=(f"{_H}post_attention_layernorm.weight",)),
    Weight(megatron=f"{_M}mlp.router.weight", hf=(f"{_H}mlp.gate.weight",)),
    *_gated("mlp.experts.", "mlp.experts.{expert}.", "{expert}"),
)
"""A mixture of gated experts with the norm and the router before it."""

SHARED_EXPERTS = _gated("mlp.shared_experts.", "mlp.shared_experts.")
"""An expert that sees every token."""

EXPERT_BIAS = (Weight(megatron=f"{_M}mlp.router.expert_bias", hf=(f"{_H}mlp.gate.e_score_correction_bias",)),)
"""What is added to the scores when experts are chosen."""


_MTP_OWN = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"}


def predictions(config: Mapping[str, Any], *parts: Iterable[Weight]) -> tuple[Prediction, ...]:
    """The layers that predict further tokens, as DeepSeek V3 and GLM 4.5 hold them after the last of `model.layers`.

    Each joins the next token's embedding to the state before, passes it through a layer made of `parts`, and has the
    model's own output layer.
    """
    found = []
    for depth in range(config.get("num_nextn_predict_layers") or 0):
        mtp, hf = f"mtp.layers.{depth}.", f"model.layers.{config['num_hidden_layers'] + depth}."
        own = [Weight(megatron=f"{mtp}{m}.weight", hf=(f"{hf}{h}.weight",)) for m, h in _MTP_OWN.items()]
        inner = [
            Weight(
                megatron=weight.megatron.replace(_M, f"{mtp}mtp_model_layer."),
                hf=tuple(name.replace(_H, hf) for name in weight.hf),
                join=weight.join,
            )
            for part in parts
            for weight in part
        ]
        head = "embedding.word_embeddings.weight" if config["tie_word_embeddings"] else "output_layer.weight"
        copies = {f"{hf}embed_tokens.weight": "embedding.word_embeddings.weight", f"{hf}shared_head.head.weight": head}
        found.append(Prediction(weights=(*own, *inner), copies=copies))
    return tuple(found)


def prediction_tensors(config: Mapping[str, Any]) -> tuple[str, ...]:
    """For `MegatronModel.ignored`: the tensors of the layers that predict further tokens, or of one such layer where
    config.json names none, for runs that take none of them. transformers leaves them out in the same way."""
    last: int = config["num_hidden_layers"]
    return tuple(rf"model\.layers\.{last + n}\..*" for n in range(config.get("num_nextn_predict_layers") or 1))


# ---- Parts of configurations ----------------------------------------------------------------------------------------


def decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TransformerConfig` that every decoder with grouped-query attention, RMS norm and gated MLPs has."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not known to the trainer; it knows 'silu'")
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not known to the trainer; set it to false")
    if quantised := config.get("quantization_config"):
        raise ValueError(
            f"its weights are quantised ({quantised.get('quant_method', 'quantization_config')}): turn them into "
            "bfloat16, and take quantization_config out of config.json"
        )
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": families.key_value_heads(config),
        "kv_channels": families.head_size(config),
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "activation_func": "silu",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def gpt(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `GPTModel`: vocabulary, length, ties and rotary embeddings."""
    return {
        "vocab_size": config["vocab_size"],
        "max_sequence_length": config["max_position_embeddings"],
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "position_embedding_type": "rope",
        **_rotary(config),
    }


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of rotary embeddings, as transformers 5 writes it: `rope_theta`, `rope_type` and more."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {"rope_theta": config.get("rope_theta", 10000.0), **given}
    found["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    return {name: value for name, value in found.items() if value is not None}


def routing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TransformerConfig` for DeepSeek V3's mixture (arXiv 2412.19437): scores by a sigmoid, a bias that only
    chooses, the best groups of experts, and shared experts; dense layers before the mixtures."""
    if not config["norm_topk_prob"]:
        raise ValueError("norm_topk_prob = false is not known to the trainer")
    groups, chosen, experts = config["n_group"], config["topk_group"], config["num_experts_per_tok"]
    if groups > 1 and experts // chosen != 2:
        raise ValueError(
            f"num_experts_per_tok ({experts}) must be twice topk_group ({chosen}): a group is rated by its two best "
            "experts, and the trainer takes as many as it chooses from each"
        )
    return {
        "moe_layer_freq": [int(n >= config["first_k_dense_replace"]) for n in range(config["num_hidden_layers"])],
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": chosen if groups > 1 else None,
        "num_moe_experts": config.get("num_local_experts", config["n_routed_experts"]),
        "moe_router_topk": experts,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"] * config["n_shared_experts"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
    }


ROUTING: Mapping[str, Any] = {
    "moe_router_load_balancing_type": "none",
    "moe_router_dtype": "fp32",
    "moe_router_bias_update_rate": 0.0,  # otherwise the bias that chooses experts would move while training
}
"""Its defaults."""


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-core's `rope_scaling` holds fast."""


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    found = rope(config)
    kind = found["rope_type"]
    base: dict[str, Any] = {"rotary_base": found["rope_theta"]}
    if partial := config.get("partial_rotary_factor", found.get("partial_rotary_factor")):
        base["rotary_percent"] = partial
    if kind == "default":
        return base
    if kind == "linear":
        return {**base, "seq_len_interpolation_factor": found["factor"]}
    if kind == "llama3" and all(found.get(name) == value for name, value in _LLAMA3.items()):
        return {**base, "rope_scaling": True, "rope_scaling_factor": found["factor"]}
    said = ", ".join(f"{name} {value}" for name, value in found.items())
    raise ValueError(f"rotary embeddings with {said} are not known to the trainer; it knows default, linear and llama3")


def weights(config: Mapping[str, Any], *parts: Iterable[Weight]) -> tuple[Weight, ...]:
    """A whole table: embedding, head unless it is tied, and `parts`."""
    head = () if config["tie_word_embeddings"] else HEAD
    return (*EMBEDDING, *head, *(weight for part in parts for weight in part))
