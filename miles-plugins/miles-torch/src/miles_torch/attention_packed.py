"""Attention within packed samples, as an implementation of transformers' attention interface.

A packed row holds trees: a trunk (a prompt) and the branches (responses) that continue it. A token attends to its
trunk and to its own branch, up to itself. So what attends are *sequences* of the row:

- a sample alone in its tree: queries and keys are its tokens, plainly causal;
- a trunk that several branches share: the same, once;
- each of those branches: queries are the branch's tokens, keys the trunk's and then the branch's, causal counted from
  the end.

In half precision on a GPU, torch's variable-length attention takes them as they are (`Ragged`). Elsewhere they are
gathered into padded blocks [sequences, heads, longest, dim], one scaled-dot-product attention runs over each, and what
comes out is scattered back (`Padded`). Padding stands at the end, where no query that counts can see it, so only the
branches need a mask. A block holds sequences whose lengths have the same power of two, so padding at most doubles it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from miles_torch.packing import Index, Tree

NAME = "miles_packed"
"""The name of this implementation in transformers' attention interface."""

_SHORT = 256
"""Longest sequence whose attention is written out in bfloat16 on a CPU, where the fused kernel's backward pass takes
three times as long. Its probabilities are kept, as many for each query as there are keys."""

_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask")


class NotPackableError(Exception):
    """The model asks for another attention than the plain causal one."""


@dataclass(frozen=True)
class Block:
    """Sequences of like length. queries, keys: int64 [sequences, longest], places in the packed row.

    mask: added to the scores, float32 [sequences or 1, 1, longest query, longest key]; None where queries and keys are
    the same tokens.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Padded:
    """blocks: as above. scatter: int64 [N], where each token of the row stands in the blocks' outputs, end to end."""

    blocks: tuple[Block, ...]
    scatter: Tensor


@dataclass(frozen=True)
class Ragged:
    """keys: int64 [K], places in the packed row of all sequences' keys, end to end; the queries are the row itself.

    query_ends, key_ends: int32 [sequences + 1], where each sequence begins and ends; longest_query, longest_key.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


Layout = Padded | Ragged


@dataclass(frozen=True)
class _Sequence:
    """queries, keys: places in the packed row; the queries are the last of the keys."""

    queries: Index
    keys: Index


def ragged(trees: Sequence[Tree], device: torch.device) -> Ragged:
    """The layout of a packed row that holds `trees` in this order, for half precision on a GPU."""
    sequences = list(_sequences(trees))  # their queries, end to end, are the row

    def ends(lengths: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.cumsum([0, *lengths])).to(device, torch.int32)

    queries = [len(sequence.queries) for sequence in sequences]
    keys = [len(sequence.keys) for sequence in sequences]
    places = np.concatenate([sequence.keys for sequence in sequences])
    return Ragged(torch.from_numpy(places).to(device), ends(queries), ends(keys), max(queries), max(keys))


def padded(trees: Sequence[Tree], device: torch.device) -> Padded:
    """The layout of a packed row that holds `trees` in this order, for any device and type."""
    classes: dict[tuple[bool, int, int], list[_Sequence]] = {}
    for sequence in _sequences(trees):
        same = sequence.queries is sequence.keys
        classes.setdefault((same, len(sequence.queries).bit_length(), len(sequence.keys).bit_length()), []).append(
            sequence
        )
    blocks = []
    scatter = np.empty(sum(tree.tokens for tree in trees), dtype=np.int64)
    done = 0
    for (same, _, _), members in classes.items():
        queries = _pad([member.queries for member in members])
        keys = queries if same else _pad([member.keys for member in members])
        for line, member in enumerate(members):
            scatter[member.queries] = done + line * queries.shape[1] + np.arange(len(member.queries))
        done += queries.size
        mask = None if same else _mask(members, queries.shape[1], keys.shape[1]).to(device)
        blocks.append(Block(torch.from_numpy(queries).to(device), torch.from_numpy(keys).to(device), mask))
    return Padded(tuple(blocks), torch.from_numpy(scatter).to(device))


def _sequences(trees: Sequence[Tree]) -> Iterable[_Sequence]:
    """What attends, in the order of the head of this module."""
    place = 0
    for tree in trees:
        trunk = np.arange(place, place + tree.trunk)
        place += tree.trunk
        shared = len(tree.branches) > 1
        if shared:
            yield _Sequence(trunk, trunk)
        for branch in tree.branches:
            own = np.arange(place, place + branch)
            place += branch
            keys = np.concatenate([trunk, own])
            if not shared:
                yield _Sequence(keys, keys)
            elif branch:
                yield _Sequence(own, keys)


def _pad(rows: Sequence[Index]) -> Index:
    """One array, short rows filled up with place 0, which no query that counts will see."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for line, row in enumerate(rows):
        padded[line, : len(row)] = row
    return padded


def _mask(members: Sequence[_Sequence], queries: int, keys: int) -> Tensor:
    """Query i of a sequence sees the keys up to its own place, which is i beyond the trunk."""
    trunks = torch.tensor([len(member.keys) - len(member.queries) for member in members])
    if (trunks == trunks[0]).all():
        trunks = trunks[:1]
    hidden = torch.arange(keys) > trunks[:, None, None] + torch.arange(queries)[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: Layout,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: [1, heads, N, dim]; key, value: [1, key heads, N, dim]; returns [1, N, heads, dim]."""
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked or attention_mask is not None:
        raise NotPackableError(f"{type(module).__name__} asks for {', '.join(asked) or 'a mask'}")
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if isinstance(packed_layout, Ragged):
        return _ragged_attention(queries, keys, values, packed_layout, scaling)[None], None
    return padded_attention(queries, keys, values, packed_layout, scaling)[None], None


def _ragged_attention(queries: Tensor, keys: Tensor, values: Tensor, layout: Ragged, scale: float | None) -> Tensor:
    """[N, heads, dim] and [N, key heads, dim] -> [N, heads, dim]."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 groups heads without being asked
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        queries.contiguous(),
        keys[layout.keys],
        values[layout.keys],
        layout.query_ends,
        layout.key_ends,
        layout.longest_query,
        layout.longest_key,
        scale=scale,
        window_size=(-1, 0),
        **grouped,
    )
    return output


def padded_attention(queries: Tensor, keys: Tensor, values: Tensor, layout: Padded, scale: float | None) -> Tensor:
    """[N, heads, dim] and [N, key heads, dim] -> [N, heads, dim]."""
    outputs = []
    for block in layout.blocks:
        parts = (
            queries[block.queries].transpose(1, 2),
            keys[block.keys].transpose(1, 2),
            values[block.keys].transpose(1, 2),
        )
        small = queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and block.keys.shape[1] <= _SHORT
        out = (_written_out if small else _fused)(*parts, block.mask, scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat[layout.scatter]


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """query [S, heads, Lq, dim], key and value [S, key heads, Lk, dim] -> [S, heads, Lq, dim]."""
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask.to(query.dtype),
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """The same by matrix products. The query heads that share a key head stand in the place of one longer sequence."""
    sequences, heads, length, width = query.shape
    shared = heads // key.shape[1]
    if mask is None:
        mask = torch.full((1, 1, length, length), -torch.inf).triu_(1)
    mask = mask.to(query.dtype).expand(-1, key.shape[1], -1, -1).repeat(1, 1, shared, 1)
    mask = mask[0, :1] if len(mask) == 1 else mask.flatten(0, 1)
    grouped = query.reshape(-1, shared * length, width)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.baddbmm(mask, grouped, keys.mT, alpha=width**-0.5 if scale is None else scale)
    return torch.bmm(scores.softmax(-1), values).view(sequences, heads, length, -1)


AttentionInterface.register(NAME, packed_attention)
