"""What model families of one shape share: completing a config.json, and counting a decoder's parameters.

For authors of model plugins. Works on plain dictionaries; imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from miles_core.errors import nearest


def complete(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` with the `given` fields in their place.

    Raises `ValueError` for a field that is not in `defaults`, with the nearest that is, and for a value of another type
    than a default's that is not None.
    """
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"unknown field {name!r}. {nearest(name, defaults)}")
        default = defaults[name]
        if default is not None and value is not None and not _fits(value, default):
            raise ValueError(f"{name} must be a {type(default).__name__}, got {value!r}")
    return {**defaults, **given}


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def check_sizes(config: Mapping[str, Any], *names: str) -> None:
    """Raises `ValueError` for a size that is not positive, and for attention heads that do not divide."""
    for name in (*names, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    heads, groups = config["num_attention_heads"], key_value_heads(config)
    if groups < 1 or heads % groups:
        raise ValueError(f"num_key_value_heads ({groups}) must divide num_attention_heads ({heads})")
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        raise ValueError(f"num_attention_heads ({heads}) must divide hidden_size ({config['hidden_size']})")
    if head_size(config) % 2:
        raise ValueError(f"the size of an attention head ({head_size(config)}) must be even: rotary embeddings pair it")


def check_groups(config: Mapping[str, Any]) -> None:
    """Raises `ValueError` for groups of experts that routed experts cannot be divided into."""
    experts, groups, chosen = config["n_routed_experts"], config["n_group"], config["topk_group"]
    if experts % groups:
        raise ValueError(f"n_group ({groups}) must divide n_routed_experts ({experts})")
    if chosen > groups:
        raise ValueError(f"topk_group ({chosen}) exceeds n_group ({groups})")


def key_value_heads(config: Mapping[str, Any]) -> int:
    """Key-value heads; as many as there are attention heads if the config does not say."""
    count: int | None = config.get("num_key_value_heads")
    return config["num_attention_heads"] if count is None else count


def head_size(config: Mapping[str, Any]) -> int:
    """Size of an attention head; the hidden size shared among the heads if the config does not say."""
    size: int | None = config.get("head_dim")
    return config["hidden_size"] // config["num_attention_heads"] if size is None else size


def attention_parameters(config: Mapping[str, Any], *, qkv_bias: bool, out_bias: bool, qk_norm: bool) -> int:
    """Parameters of one grouped-query attention. qk_norm: one RMS norm each over the heads of query and key."""
    queries = config["num_attention_heads"] * head_size(config)
    keys_values = 2 * key_value_heads(config) * head_size(config)
    weights: int = config["hidden_size"] * (2 * queries + keys_values)
    biases: int = qkv_bias * (queries + keys_values) + out_bias * config["hidden_size"]
    return weights + biases + qk_norm * 2 * head_size(config)


def gated_mlp_parameters(hidden: int, intermediate: int, *, bias: bool = False) -> int:
    """Parameters of one gated MLP: gate and up projections, and down."""
    return 3 * hidden * intermediate + bias * (2 * intermediate + hidden)


def mixture_parameters(hidden: int, width: int, *, routed: int, shared: int) -> int:
    """Parameters of a mixture of gated experts: `routed` ones with their rows of the router, and `shared` ones."""
    return routed * hidden + (routed + shared) * gated_mlp_parameters(hidden, width)


def decoder_parameters(config: Mapping[str, Any], layers: Iterable[int]) -> int:
    """Parameters of a decoder: embedding, head unless tied, final norm, and `layers`, each without its two norms."""
    hidden: int = config["hidden_size"]
    embedding: int = config["vocab_size"] * hidden
    return (
        embedding * (1 if config["tie_word_embeddings"] else 2) + hidden + sum(2 * hidden + layer for layer in layers)
    )
