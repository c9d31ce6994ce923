"""Attention within packed samples, as an implementation of transformers' attention interface.

A packed row holds trees: a trunk (a prompt) and the branches (responses) that continue it. A token attends to its
trunk and to its own branch, up to itself. The row is gathered into padded blocks [samples, heads, longest, dim], one
scaled-dot-product attention runs over each, and what comes out is scattered back:

- a sample alone in its tree: queries and keys are its tokens, plainly causal. Padding stands at the end, where no
  query that counts can see it, so no mask is needed;
- a trunk that several branches share: the same, once;
- those branches: queries are the branch's tokens, keys the trunk's and then the branch's, with a mask, because each
  query stands further along its keys than along its queries.

A block holds samples whose lengths have the same power of two, so padding at most doubles it.
"""

from __future__ import annotations

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
class Layout:
    """blocks: as above. scatter: int64 [N], where each token of the row stands in the blocks' outputs, end to end."""

    blocks: tuple[Block, ...]
    scatter: Tensor


@dataclass(frozen=True)
class _Sequence:
    """queries, keys: places in the packed row; the queries are the last of the keys."""

    queries: Index
    keys: Index


def layout(trees: Sequence[Tree], device: torch.device) -> Layout:
    """The layout of a packed row that holds `trees` in this order."""
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
    return Layout(tuple(blocks), torch.from_numpy(scatter).to(device))


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
    outputs = []
    for block in packed_layout.blocks:
        mask = None if block.mask is None else block.mask.to(query.dtype)
        out = F.scaled_dot_product_attention(
            queries[block.queries].transpose(1, 2),
            keys[block.keys].transpose(1, 2),
            values[block.keys].transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat[packed_layout.scatter].unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)
