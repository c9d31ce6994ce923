"""Attention over a static key-value cache, for any transformers model that calls the attention interface.

transformers lets a model's attention be replaced by name, and makes no mask for a name that it does not know. The
function registered here writes the new keys and values into the cache and attends to what a sequence has there, so
the model's own forward runs unchanged and without a cache of its own. What a forward means is set around it by
`attending`: a `Prefill` (whole sequences, packed end to end) or a `Decode` (one new token for each row).

A sequence's token t lies at place t of its row. Rows are dense: 0 to B - 1 are in use.

Shapes: R rows of the cache; B rows in use; N longest sequence; T packed tokens; Hq, Hk heads of queries and of keys and
values; D, Dv their widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "miles_cached"
"""The name in `config._attn_implementation`."""

_BLOCK = 128
"""The buffers' length is a multiple of it."""


class KVCache:
    """Keys and values of R sequences, in static buffers that grow only when a longer or a wider wave is announced.

    layers: layer index -> (keys [R, N, Hk, D], values [R, N, Hk, Dv]).
    """

    def __init__(self) -> None:
        self.rows = 0
        self.length = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, rows: int, length: int) -> None:
        """Makes room for at least `rows` sequences of `length` tokens; what is there stays."""
        if rows <= self.rows and length <= self.length:
            return
        self.rows, self.length = max(rows, self.rows), max(-(-length // _BLOCK) * _BLOCK, self.length)
        for index, buffers in self.layers.items():
            self.layers[index] = (self._grown(buffers[0]), self._grown(buffers[1]))

    def _grown(self, buffer: Tensor) -> Tensor:
        grown = buffer.new_zeros(self.rows, self.length, *buffer.shape[2:])
        grown[: buffer.shape[0], : buffer.shape[1]] = buffer
        return grown

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer whose new keys and values look like `key` [..., Hk, D] and `value` [..., Hk, Dv].

        They begin as zeros, because a place that is masked away must still hold a number.
        """
        if index not in self.layers:
            self.layers[index] = (
                key.new_zeros(self.rows, self.length, *key.shape[-2:]),
                value.new_zeros(self.rows, self.length, *value.shape[-2:]),
            )
        return self.layers[index]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` places of a row to another row."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[target, :length] = buffer[source, :length]

    def clear(self) -> None:
        """Gives the memory back."""
        self.rows = self.length = 0
        self.layers.clear()


@dataclass
class Prefill:
    """Whole sequences packed end to end: sequence i is tokens bounds[i] to bounds[i + 1] and goes to row rows[i]."""

    cache: KVCache
    bounds: Sequence[int]
    rows: Sequence[int]


@dataclass
class Decode:
    """One new token for each of the first B rows.

    positions: int64 [B], each token's place; length: places that any row uses, the new one included.
    flat: int64 [B], the places in a buffer seen as [R * N, ...].
    """

    cache: KVCache
    positions: Tensor
    length: int
    flat: Tensor = field(init=False)
    _masks: dict[int | None, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.positions)
        self.flat = self.positions + torch.arange(count, device=self.positions.device) * self.cache.length

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where a row's token may look and -inf elsewhere, [B, 1, 1, length]; made once a step."""
        if window not in self._masks:
            places = torch.arange(self.length, device=self.positions.device)
            hidden = places > self.positions.unsqueeze(1)
            if window is not None:
                hidden |= places <= self.positions.unsqueeze(1) - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


_step: ContextVar[Prefill | Decode] = ContextVar("miles_torch_attention_step")


@contextmanager
def attending(step: Prefill | Decode) -> Iterator[None]:
    """Within it, a model's forward in this thread means `step`."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


@dataclass(frozen=True)
class _Terms:
    """What a model adds to plain attention: scale; window of sliding attention; cap of the scores; attention sinks,
    one score for each query head, as [Hq]."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether a fused kernel can do it."""
        return self.softcap is None and self.sinks is None


_IGNORED = frozenset({"dropout", "position_ids", "is_causal", "output_attentions", "use_cache", "cache_position"})


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: query [B, Hq, S, D], key and value [B, Hk, S, D] of the new tokens.

    Returns [B, S, Hq, Dv]. `NotImplementedError` for a mask or a term that it does not know: wrong numbers would be
    worse.
    """
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _IGNORED)
    if attention_mask is not None or unknown:
        raise NotImplementedError(
            f"{type(module).__name__} attends with {', '.join(unknown) or 'a mask of its own'}, "
            "which the engine 'torch' does not know"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    terms = _Terms(scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux)
    step = _step.get()
    index: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(step, Prefill):
        return _prefill(step, index, query, key, value, terms), None
    return _decode(step, index, query, key, value, terms), None


AttentionInterface.register(NAME, cached_attention)


def _prefill(step: Prefill, index: int, query: Tensor, key: Tensor, value: Tensor, terms: _Terms) -> Tensor:
    """query [1, Hq, T, D] -> [1, T, Hq, Dv]; each sequence by itself, so nothing is padded or masked away."""
    keys, values = step.cache.layer(index, key.transpose(1, 2), value.transpose(1, 2))
    parts = []
    for row, start, end in zip(step.rows, step.bounds, step.bounds[1:], strict=False):
        span = slice(start, end)
        keys[row, : end - start] = key[0, :, span].transpose(0, 1)
        values[row, : end - start] = value[0, :, span].transpose(0, 1)
        new = query[:, :, span], key[:, :, span], value[:, :, span]
        parts.append(_causal(*new, terms).transpose(1, 2))
    return torch.cat(parts, dim=1)


def _causal(query: Tensor, key: Tensor, value: Tensor, terms: _Terms) -> Tensor:
    """One sequence of S tokens over itself: query [1, Hq, S, D] -> [1, Hq, S, Dv]."""
    length = query.shape[2]
    windowed = terms.window is not None and terms.window < length
    mask = _causal_mask(length, terms.window, query) if windowed or not terms.plain else None
    if mask is not None and not terms.plain:
        return _attend(query, key, value, mask, terms)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=terms.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _decode(step: Decode, index: int, query: Tensor, key: Tensor, value: Tensor, terms: _Terms) -> Tensor:
    """query [B, Hq, 1, D] -> [B, 1, Hq, Dv]."""
    keys, values = step.cache.layer(index, key.transpose(1, 2), value.transpose(1, 2))
    keys.flatten(0, 1).index_copy_(0, step.flat, key.squeeze(2))
    values.flatten(0, 1).index_copy_(0, step.flat, value.squeeze(2))
    rows = len(step.positions)
    seen_keys = keys[:rows, : step.length].transpose(1, 2)
    seen_values = values[:rows, : step.length].transpose(1, 2)
    mask = step.mask(terms.window, query.dtype)
    if not terms.plain:
        return _attend(query, seen_keys, seen_values, mask, terms).transpose(1, 2)
    # The queries that share a key head stand in the place of a sequence, so keys and values are not repeated.
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[-1])
    out = F.scaled_dot_product_attention(grouped, seen_keys, seen_values, attn_mask=mask, scale=terms.scale)
    return out.reshape(rows, 1, query.shape[1], -1)


def _causal_mask(length: int, window: int | None, like: Tensor) -> Tensor:
    """0 where token i may look at token j and -inf elsewhere, [1, 1, length, length]."""
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=like.device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, terms: _Terms) -> Tensor:
    """Attention written out, for the terms that no fused kernel has.

    query [B, Hq, S, D], key [B, Hk, L, D], value [B, Hk, L, Dv], mask [B or 1, 1, S, L] -> [B, Hq, S, Dv].
    """
    heads = key.shape[1]
    scores = query.reshape(len(query), heads, -1, *query.shape[2:]) @ key.unsqueeze(2).transpose(-1, -2) * terms.scale
    if terms.softcap is not None:
        scores = torch.tanh(scores / terms.softcap) * terms.softcap
    scores = scores + mask.unsqueeze(1)
    if terms.sinks is None:
        weights = scores.softmax(dim=-1, dtype=torch.float32)
    else:
        sinks = terms.sinks.view(heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
    out: Tensor = weights.to(value.dtype) @ value.unsqueeze(2)
    return out.flatten(1, 2)
