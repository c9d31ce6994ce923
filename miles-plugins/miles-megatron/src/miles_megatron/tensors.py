"""Which Hugging Face tensors a model is made of, from its description alone: nothing is built, no Megatron imported.

So a folder of another model is refused before a process is started. Shapes and layers follow from the names that
Megatron's parameters have, as `decoder.layers.{layer}.mlp.router.weight` is in layers with experts, [experts, hidden].
What stands in the place of a family's own module may be there or not, in any shape: a trainer's ranks compare that with
the model that they have built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from miles_core.megatron import MegatronModel, Weight
from miles_core.run.weight_files import Shape, check_tensors

_LAYER = "decoder.layers.{layer}."
_FURTHER = re.compile(r"mtp\.layers\.\d+\.(mtp_model_layer\.)?")
_SPARSE = ("pre_mlp_layernorm.", "mlp.router.", "mlp.experts.", "mlp.shared_experts.")
_DENSE = ("mlp.linear_",)


def check_folder(folder: Path, model: MegatronModel) -> None:
    """Raises `UserError` if a Hugging Face folder holds other tensors than those of the model. Reads headers alone."""
    required, optional = expected(model)
    check_tensors(folder, required, (*optional, *ignored(model)))


def ignored(model: MegatronModel) -> tuple[str, ...]:
    """Regular expressions of tensors that a folder may hold and a trainer does not read."""
    tied = (r"lm_head\.weight",) if model.tied else ()
    return (*model.ignored, r".*rotary_emb\.inv_freq", *tied)


def expected(model: MegatronModel) -> tuple[dict[str, Shape | None], tuple[str, ...]]:
    """Name -> shape of the tensors that a folder must hold, None for any; and regular expressions of those that it may
    hold besides."""
    required: dict[str, Shape | None] = {}
    optional = [re.escape(copy) for copy in model.copies]
    sizes = _Sizes(model)
    for weight in model.weights:
        shapes = sizes.of(weight)
        if shapes is None or any(_replaced(weight, places) for places in (model.modules, *model.layers.values())):
            optional += [re.sub(r"\\{\w+\\}", r"\\d+", re.escape(name)) for name in weight.hf]
        for numbers in _numbers(weight, model) if shapes is not None else ():
            for name, shape in zip(weight.hf, shapes or (), strict=True):
                required[name.format(**numbers)] = shape if sizes.certain else None
    return required, tuple(optional)


def _numbers(weight: Weight, model: MegatronModel) -> Iterator[Mapping[str, int]]:
    """The numbers of layer and expert of all parameters of a kind, but for those of a family's own modules."""
    for layer in _layers(weight, model):
        for expert in range(model.transformer["num_moe_experts"]) if "{expert}" in weight.megatron else (0,):
            yield {"layer": layer, "expert": expert}


def _layers(weight: Weight, model: MegatronModel) -> list[int]:
    """Which have this kind of parameter; one number, which does not matter, for what is in no layer of the model."""
    part, said = _part(weight), model.transformer
    own = {n: {**model.modules, **model.layers.get(n, {})} for n in range(said["num_layers"])}
    if _FURTHER.match(weight.megatron):  # such a layer is made as the last one is
        return [] if _replaced(weight, own[said["num_layers"] - 1]) else [0]
    if not weight.megatron.startswith(_LAYER):
        return [0]
    layers = [n for n, places in own.items() if not _replaced(weight, places)]
    if part.startswith((*_SPARSE, *_DENSE)):
        return [n for n in layers if _has_experts(said, n) == part.startswith(_SPARSE)]
    return layers


def _has_experts(said: Mapping[str, Any], layer: int) -> bool:
    if said.get("num_moe_experts") is None:
        return False
    pattern = said.get("moe_layer_freq", 1)
    return layer % pattern == 0 if isinstance(pattern, int) else bool(pattern[layer])


def _part(weight: Weight) -> str:
    """A parameter's name in its layer, or in the model."""
    return _FURTHER.sub("", weight.megatron.removeprefix(_LAYER))


def _replaced(weight: Weight, places: Mapping[str, str]) -> bool:
    return any(_part(weight).startswith(f"{place}.") for place in places)


class _Sizes:
    """Shapes of a model's tensors. certain: nothing in its description makes them others than are known here."""

    def __init__(self, model: MegatronModel) -> None:
        said = model.transformer
        self.certain = not said.keys() & _RESHAPING
        width, queries = said["kv_channels"], said["num_attention_heads"]
        self._said = SimpleNamespace(
            hidden=said["hidden_size"],
            vocabulary=model.gpt["vocab_size"],
            width=width,
            queries=queries * width,
            keys=(said.get("num_query_groups") or queries) * width,
            inner=said.get("ffn_hidden_size"),
            experts=said.get("num_moe_experts"),
            routed=said.get("moe_ffn_hidden_size"),
            shared=said.get("moe_shared_expert_intermediate_size"),
        )
        self._known = _KNOWN
        if said.get("multi_latent_attention"):
            rotary, plain, values = said["qk_pos_emb_head_dim"], said["qk_head_dim"], said["v_head_dim"]
            self._said.rotary, self._said.values = rotary, queries * values
            self._said.queries = queries * (plain + rotary)
            self._said.both = queries * (plain + values)
            self._said.narrow, self._said.latent = said["q_lora_rank"], said["kv_lora_rank"]
            self._known = {**_KNOWN, **_LATENT}

    def of(self, weight: Weight) -> tuple[Shape, ...] | None:
        """Of the tensors that a parameter of a kind is made of; None if it is not known."""
        shapes = self._known.get(_part(weight))
        found = None if shapes is None else shapes(self._said)
        return found if found is not None and len(found) == len(weight.hf) else None


_RESHAPING = frozenset({"attention_output_gate", "experimental_attention_variant", "moe_latent_size"})
"""Fields that change the shapes below."""


def _gated(size: str, where: str, expert: str = "") -> dict[str, Callable[[Any], tuple[Shape, ...]]]:
    return {
        f"{where}.linear_fc1.weight{expert}": lambda n: ((getattr(n, size), n.hidden),) * 2,
        f"{where}.linear_fc2.weight{expert}": lambda n: ((n.hidden, getattr(n, size)),),
    }


def _vector(n: Any) -> tuple[Shape, ...]:
    return ((n.hidden,),)


_KNOWN: Mapping[str, Callable[[Any], tuple[Shape, ...]]] = {
    "embedding.word_embeddings.weight": lambda n: ((n.vocabulary, n.hidden),),
    "output_layer.weight": lambda n: ((n.vocabulary, n.hidden),),
    "decoder.final_layernorm.weight": _vector,
    "self_attention.linear_qkv.layer_norm_weight": _vector,
    "self_attention.linear_qkv.weight": lambda n: ((n.queries, n.hidden), *((n.keys, n.hidden),) * 2),
    "self_attention.linear_qkv.bias": lambda n: ((n.queries,), *((n.keys,),) * 2),
    "self_attention.linear_proj.weight": lambda n: ((n.hidden, n.queries),),
    "self_attention.q_layernorm.weight": lambda n: ((n.width,),),
    "self_attention.k_layernorm.weight": lambda n: ((n.width,),),
    "mlp.linear_fc1.layer_norm_weight": _vector,
    **_gated("inner", "mlp"),
    "pre_mlp_layernorm.weight": _vector,
    "mlp.router.weight": lambda n: ((n.experts, n.hidden),),
    "mlp.router.expert_bias": lambda n: ((n.experts,),),
    **_gated("routed", "mlp.experts", "{expert}"),
    **_gated("shared", "mlp.shared_experts"),
    # of a layer that predicts a further token
    "enorm.weight": _vector,
    "hnorm.weight": _vector,
    "final_layernorm.weight": _vector,
    "eh_proj.weight": lambda n: ((n.hidden, 2 * n.hidden),),
}
"""Parameter, in a layer by its name there -> shapes of the tensors that it is made of."""

_LATENT: Mapping[str, Callable[[Any], tuple[Shape, ...]]] = {
    "input_layernorm.weight": _vector,
    "self_attention.linear_proj.weight": lambda n: ((n.hidden, n.values),),
    "self_attention.linear_q_down_proj.weight": lambda n: ((n.narrow, n.hidden),),
    "self_attention.linear_q_up_proj.layer_norm_weight": lambda n: ((n.narrow,),),
    "self_attention.linear_q_up_proj.weight": lambda n: ((n.queries, n.narrow),),
    "self_attention.linear_kv_down_proj.weight": lambda n: ((n.latent + n.rotary, n.hidden),),
    "self_attention.linear_kv_up_proj.layer_norm_weight": lambda n: ((n.latent,),),
    "self_attention.linear_kv_up_proj.weight": lambda n: ((n.both, n.latent),),
}
"""The same of latent attention."""
