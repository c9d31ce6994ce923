"""How the samples of a batch become micro-batches: plain numpy, the same on every rank.

Three things save work without changing any result:

- A sample's tokens from its last trained one on are left out: nothing trained depends on them.
- Samples with the same prompt are packed as one *tree*: the prompt once, then each sample's own tokens, at positions
  that continue the prompt's. Every token attends to its prompt and to its own sample, as if it stood alone.
- Samples without a trained token are left out.

Shapes: N tokens of the packed row; T trained tokens; a *trunk* is the prompt that a tree shares, a *branch* what a
sample has beyond it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miles_core.sample import Batch

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Tree:
    """Samples that share a trunk. samples: rows of the batch. trunk, branches: numbers of tokens."""

    samples: tuple[int, ...]
    trunk: int
    branches: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that it takes in a packed row."""
        return self.trunk + sum(self.branches)


@dataclass(frozen=True)
class Packed:
    """A micro-batch, as indices.

    trees: what stands in the packed row, in order. tokens, positions: int64 [N]. sources: int64 [T], the place in the
    packed row whose output predicts each trained token; targets: int64 [T], those tokens; rows: int64 [T], their
    places in the batch's columns; segments: int64 [T], which of the micro-batch's samples each belongs to.
    dummy: it only keeps this rank in step with the others and must not count.
    """

    trees: tuple[Tree, ...]
    tokens: Index
    positions: Index
    sources: Index
    targets: Index
    rows: Index
    segments: Index
    dummy: bool = False

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(len(tree.samples) for tree in self.trees)


def plan(
    batch: Batch, samples: Iterable[int], *, budget: int, world_size: int = 1, share: bool = True
) -> list[list[Packed]]:
    """The micro-batches of each rank, equally many on every rank; none at all if no token is trained.

    budget: most tokens of a micro-batch, unless one sample alone has more. share: whether prompts are shared.
    """
    trees = _trees(batch, samples, share)
    if not trees:
        return [[] for _ in range(world_size)]
    fair = -(-sum(tree.tokens for tree in trees) // world_size)
    pieces = [piece for tree in trees for piece in _split(tree, min(budget, fair))]
    ranks = [_bins(own, budget) for own in _balance(pieces, world_size)]
    filler = min(pieces, key=lambda tree: tree.tokens)
    most = max(len(bins) for bins in ranks)
    return [
        [_pack(batch, bin_) for bin_ in bins] + [_pack(batch, [filler], dummy=True)] * (most - len(bins))
        for bins in ranks
    ]


def _trees(batch: Batch, samples: Iterable[int], share: bool) -> list[Tree]:
    """One tree per distinct prompt (per sample if nothing is shared), in order of appearance."""
    found: dict[object, list[tuple[int, int, int]]] = {}
    for sample in samples:
        start, end = int(batch.cu_seqlens[sample]), int(batch.cu_seqlens[sample + 1])
        trained = np.flatnonzero(batch["mask"][start:end])
        if not len(trained):
            continue
        if trained[0] == 0:
            raise ValueError(f"sample {describe(batch, sample)}: its first token is masked as trained")
        length = int(trained[-1])  # the last trained token is predicted, never read
        trunk = min(int(batch.samples["prompt_length"][sample]), length) if share else length
        key = batch["tokens"][start : start + trunk].tobytes() if share else sample
        found.setdefault(key, []).append((int(sample), trunk, length - trunk))
    return [
        Tree(tuple(member[0] for member in members), members[0][1], tuple(member[2] for member in members))
        for members in found.values()
    ]


def _split(tree: Tree, limit: int) -> list[Tree]:
    """The tree in parts of at most `limit` tokens, each with the trunk; a part has at least one sample."""
    parts: list[list[int]] = [[]]
    size = tree.trunk
    for place, branch in enumerate(tree.branches):
        if parts[-1] and size + branch > limit:
            parts.append([])
            size = tree.trunk
        parts[-1].append(place)
        size += branch
    return [
        Tree(tuple(tree.samples[i] for i in part), tree.trunk, tuple(tree.branches[i] for i in part)) for part in parts
    ]


def _balance(trees: Sequence[Tree], world_size: int) -> list[list[Tree]]:
    """Longest first, each to the rank that has least."""
    ranks: list[list[Tree]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for tree in sorted(trees, key=lambda tree: -tree.tokens):
        rank = loads.index(min(loads))
        ranks[rank].append(tree)
        loads[rank] += tree.tokens
    return ranks


def _bins(trees: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """First fit; `trees` come longest first, so samples of like length stand together."""
    bins: list[list[Tree]] = []
    loads: list[int] = []
    for tree in trees:
        place = next((i for i, load in enumerate(loads) if load + tree.tokens <= budget), len(bins))
        if place == len(bins):
            bins.append([])
            loads.append(0)
        bins[place].append(tree)
        loads[place] += tree.tokens
    return bins


def _pack(batch: Batch, trees: Sequence[Tree], *, dummy: bool = False) -> Packed:
    """The indices of one micro-batch."""
    tokens: list[Index] = []
    positions: list[Index] = []
    sources: list[Index] = []
    rows: list[Index] = []
    counts: list[int] = []
    place = 0
    for tree in trees:
        first = int(batch.cu_seqlens[tree.samples[0]])
        tokens.append(np.arange(first, first + tree.trunk))
        positions.append(np.arange(tree.trunk))
        own = place + tree.trunk
        for sample, branch in zip(tree.samples, tree.branches, strict=True):
            start = int(batch.cu_seqlens[sample])
            tokens.append(np.arange(start + tree.trunk, start + tree.trunk + branch))
            positions.append(np.arange(tree.trunk, tree.trunk + branch))
            trained = np.flatnonzero(batch["mask"][start : int(batch.cu_seqlens[sample + 1])])
            read = trained - 1
            sources.append(np.where(read < tree.trunk, place + read, own + read - tree.trunk))
            rows.append(start + trained)
            counts.append(len(trained))
            own += branch
        place = own
    row = np.concatenate(rows)
    return Packed(
        trees=tuple(trees),
        tokens=batch["tokens"][np.concatenate(tokens)].astype(np.int64),
        positions=np.concatenate(positions),
        sources=np.concatenate(sources),
        targets=batch["tokens"][row].astype(np.int64),
        rows=row,
        segments=np.repeat(np.arange(len(counts)), counts),
        dummy=dummy,
    )


def describe(batch: Batch, sample: int) -> str:
    """A sample's name for messages: group and index where the batch has them."""
    if "group" in batch.samples and "index" in batch.samples:
        return f"{int(batch.samples['group'][sample])}/{int(batch.samples['index'][sample])}"
    return str(sample)
