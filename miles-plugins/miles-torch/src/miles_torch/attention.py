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
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "miles_cached"
"""The name in `config._attn_implementation`."""

_ROWS, _BLOCK = 8, 128
"""The buffers' rows and length are multiples of them, so that they seldom grow."""

_STRIDE = 16
"""Attention spans a multiple of it. For common head widths a CPU's sums then come out the same, bit for bit, however
far other rows reach (up to about 384 tokens; further if fewer than four query heads share a key head)."""


class KVCache:
    """Keys and values of R sequences, in static buffers that grow only when a longer or a wider wave comes.

    layers: layer index -> (keys [R, Hk, N, D], values [R, Hk, N, Dv]).
    """

    def __init__(self) -> None:
        self.rows = 0
        self.length = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, rows: int, length: int) -> None:
        """Makes room for at least `rows` sequences of `length` tokens; what is there stays."""
        if rows <= self.rows and length <= self.length:
            return
        self.rows = max(_rounded(rows, _ROWS), self.rows)
        self.length = max(_rounded(length, _BLOCK), self.length)
        for index, buffers in self.layers.items():
            self.layers[index] = (self._grown(buffers[0]), self._grown(buffers[1]))

    def _grown(self, buffer: Tensor) -> Tensor:
        grown = buffer.new_zeros(self.rows, buffer.shape[1], self.length, buffer.shape[3])
        grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
        return grown

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer whose new keys and values look like `key` [..., Hk, D] and `value` [..., Hk, Dv].

        They begin as zeros, because a place that is masked away must still hold a number.
        """
        if index not in self.layers:
            self.layers[index] = (
                key.new_zeros(self.rows, key.shape[-2], self.length, key.shape[-1]),
                value.new_zeros(self.rows, value.shape[-2], self.length, value.shape[-1]),
            )
        return self.layers[index]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` places of a row to another row."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[target, :, :length] = buffer[source, :, :length]

    def clear(self) -> None:
        """Gives the memory back."""
        self.rows = self.length = 0
        self.layers.clear()


@dataclass
class Prefill:
    """Whole sequences packed end to end: sequence i is tokens bounds[i] to bounds[i + 1] and goes to row rows[i],
    if there is a cache."""

    cache: KVCache | None
    bounds: Sequence[int]
    rows: Sequence[int]


@dataclass
class Decode:
    """One new token for each of the first B rows.

    positions: int64 [B], each token's place; length: places that attention spans, at least all that any row uses.
    """

    cache: KVCache
    positions: Tensor
    length: int
    _masks: dict[tuple[int | None, int], Tensor] = field(init=False, default_factory=dict)
    _places: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.length = _rounded(self.length, _STRIDE)

    def places(self, heads: int) -> Tensor:
        """Where the new tokens go in a buffer seen as [R * Hk * N, ...], int64 [B * Hk]; made once a step."""
        if heads not in self._places:
            rows = torch.arange(len(self.positions) * heads, device=self.positions.device).view(-1, heads)
            self._places[heads] = (self.positions.unsqueeze(1) + rows * self.cache.length).flatten()
        return self._places[heads]

    def mask(self, window: int | None, dtype: torch.dtype, heads: int = 1) -> Tensor:
        """0 where a row's token may look and -inf elsewhere, [B, heads, 1, length]; made once a step."""
        if (window, heads) not in self._masks:
            places = torch.arange(self.length, device=self.positions.device)
            hidden = places > self.positions.unsqueeze(1)
            if window is not None:
                hidden |= places <= self.positions.unsqueeze(1) - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[window, heads] = mask[:, None, None].repeat(1, heads, 1, 1)
        return self._masks[window, heads]


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


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
class Terms:
    """What a model adds to plain attention: scale; window of sliding attention; cap of the scores; attention sinks,
    one score for each query head, as [Hq]."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether a fused kernel can do it."""
        return self.softcap is None and self.sinks is None


_IGNORED = frozenset({"dropout", "position_ids", "is_causal", "output_attentions", "output_router_logits"})
"""What models pass on that changes nothing here: it never trains, and a token's place is in the step."""


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
    used = {name for name, given in others.items() if given is not None and given is not False}
    unknown = sorted(used - _IGNORED)
    if attention_mask is not None or unknown:
        raise NotImplementedError(
            f"{type(module).__name__} attends with {', '.join(unknown) or 'a mask of its own'}, "
            "which the engine 'torch' does not know"
        )
    terms = Terms(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    new = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    out = attend(_step.get(), module.layer_idx, new[0], new[1], new[2], terms)  # type: ignore[arg-type]
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


AttentionInterface.register(NAME, cached_attention)


def attend(step: Prefill | Decode, index: int, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
    """Writes the new tokens' keys and values of layer `index` into the cache and attends.

    query [T, Hq, D], key [T, Hk, D], value [T, Hk, Dv] of the step's tokens (T = B when decoding) -> [T, Hq, Dv].
    """
    if isinstance(step, Prefill):
        if step.cache is not None:
            _keep(step, step.cache.layer(index, key, value), key, value)
        return _prefill(step, query, key, value, terms)
    return _decode(step, step.cache.layer(index, key, value), query, key, value, terms)


_Buffers = tuple[Tensor, Tensor]


def _keep(step: Prefill, buffers: _Buffers, key: Tensor, value: Tensor) -> None:
    """Writes each sequence's keys and values into its row."""
    for row, (start, end) in zip(step.rows, pairwise(step.bounds), strict=True):
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer[row, :, : end - start] = new[start:end].transpose(0, 1)


def _prefill(step: Prefill, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
    """Each sequence by itself, so nothing is padded or masked away."""
    parts = []
    for start, end in pairwise(step.bounds):
        one, keys, values = (new[start:end].transpose(0, 1).unsqueeze(0) for new in (query, key, value))
        parts.append(_causal(one, keys, values, terms).squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def _causal(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
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


def _decode(step: Decode, buffers: _Buffers, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
    rows, heads = key.shape[:2]
    for buffer, new in zip(buffers, (key, value), strict=True):
        buffer.flatten(0, 2).index_copy_(0, step.places(heads), new.flatten(0, 1))
    keys, values = (buffer[:rows, :, : step.length] for buffer in buffers)
    if not terms.plain:
        mask = step.mask(terms.window, query.dtype)
        return _attend(query.unsqueeze(2), keys, values, mask, terms).squeeze(2)
    # The queries that share a key head stand in the place of a sequence, so keys and values are not repeated.
    grouped = query.reshape(rows, heads, -1, query.shape[-1])
    if query.device.type == "cpu" and query.dtype == torch.float32:
        # Two batched matrix products are faster there than the fused kernel, which has little to fuse for one token.
        mask = step.mask(terms.window, query.dtype, heads).flatten(0, 1)
        products = torch.baddbmm(mask, grouped.flatten(0, 1), keys.flatten(0, 1).mT, alpha=terms.scale)
        return torch.bmm(products.softmax(dim=-1), values.flatten(0, 1)).view(rows, -1, values.shape[-1])
    mask = step.mask(terms.window, query.dtype)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=terms.scale).flatten(1, 2)


def _causal_mask(length: int, window: int | None, like: Tensor) -> Tensor:
    """0 where token i may look at token j and -inf elsewhere, [1, 1, length, length]."""
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=like.device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, terms: Terms) -> Tensor:
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
