"""Attention within packed samples, as an implementation of transformers' attention interface.

A packed row holds trees: a trunk (prompt) and the branches (responses) that continue it. Seen from one sample, the
keys are its trunk's and then its branch's. So each sample is gathered from the row into a padded block
[samples, heads, longest, dim] and one causal scaled-dot-product attention runs over it: padding stands at the end,
where no query that counts can see it, so no mask is needed. What comes out is scattered back; a trunk's outputs are
taken from its tree's first sample. Blocks hold samples of like length, so padding at most doubles them.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Samples of like length. gather: int64 [samples * longest], places in the packed row."""

    gather: Tensor
    samples: int
    longest: int


@dataclass(frozen=True)
class Layout:
    """blocks: as above. scatter: int64 [N], where each token of the row stands in the blocks' outputs, end to end."""

    blocks: tuple[Block, ...]
    scatter: Tensor


def layout(trees: Sequence[Tree], device: torch.device) -> Layout:
    """The layout of a packed row that holds `trees` in this order."""
    rows = _sample_rows(trees)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    blocks: list[Block] = []
    scatter = np.empty(sum(tree.tokens for tree in trees), dtype=np.int64)
    done = 0
    while order:
        longest = len(rows[order[0]])
        members = [i for i in order if 2 * len(rows[i]) >= longest]
        order = order[len(members) :]
        gather = np.zeros((len(members), longest), dtype=np.int64)
        for line, member in enumerate(members):
            gather[line, : len(rows[member])] = rows[member]
            scatter[rows[member]] = done + line * longest + np.arange(len(rows[member]))
        blocks.append(Block(torch.from_numpy(gather.reshape(-1)).to(device), len(members), longest))
        done += gather.size
    return Layout(tuple(blocks), torch.from_numpy(scatter).to(device))


def _sample_rows(trees: Sequence[Tree]) -> list[Index]:
    """For each sample the places of its tokens in the packed row: its trunk's, then its branch's."""
    rows = []
    place = 0
    for tree in trees:
        trunk = np.arange(place, place + tree.trunk)
        place += tree.trunk
        for branch in tree.branches:
            rows.append(np.concatenate([trunk, np.arange(place, place + branch)]))
            place += branch
    return rows


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
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for block in packed_layout.blocks:
        q, k, v = (
            row[block.gather].view(block.samples, block.longest, row.shape[1], row.shape[2]).transpose(1, 2)
            for row in rows
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat[packed_layout.scatter].unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)
