"""How the samples of a mini-batch become micro-batches: plain numpy, the same on every rank.

Every data-parallel rank gets equally many micro-batches, because pipelines and expert groups run in step, and as few as
the token budget allows. They are filled evenly: samples go, longest first, to the emptiest micro-batch; where that
overflows one, each goes to the fullest that still takes it. The micro-batches are then dealt to the ranks so that their
sums are even too. What depends on no packing is left out: a sample's tokens from its last trained one on, and samples
without any.

Context parallelism cuts each sample into 2 C parts, of which rank c holds part c and part 2 C - 1 - c, so that causal
attention costs every rank the same. Samples are padded at their end to a length that can be cut so.

Shapes: N tokens of a rank's packed row; T trained tokens among those it predicts; C context-parallel ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miles_core.sample import Batch

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A sample of a batch. length: tokens that are read; padded: the same with padding."""

    sample: int
    length: int
    padded: int


@dataclass(frozen=True)
class Cut:
    """How a row must be divisible. context: context-parallel ranks; multiple: of a rank's part of the row."""

    context: int = 1
    multiple: int = 1

    def padded(self, length: int) -> int:
        """The length of a sample with padding."""
        parts = 2 * self.context if self.context > 1 else 1
        return -(-length // parts) * parts


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass. dummy: it only keeps its rank in step and must not count."""

    pieces: tuple[Piece, ...]
    dummy: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of its row, without what fills the row up."""
        return sum(piece.padded for piece in self.pieces)


def pieces(batch: Batch, samples: Sequence[int], cut: Cut) -> list[Piece]:
    """The samples that have a trained token. Raises `ValueError` for one whose first token is trained."""
    found = []
    for sample in samples:
        start, end = int(batch.cu_seqlens[sample]), int(batch.cu_seqlens[sample + 1])
        trained = np.flatnonzero(batch["mask"][start:end])
        if not len(trained):
            continue
        if trained[0] == 0:
            raise ValueError(f"sample {sample}: its first token is masked as trained")
        length = int(trained[-1])  # the last trained token is predicted, never read
        found.append(Piece(int(sample), length, cut.padded(length)))
    return found


def plan(found: Sequence[Piece], *, budget: int, ranks: int, group: int = 1) -> list[list[MicroBatch]]:
    """The micro-batches of each data-parallel rank, equally many and a multiple of `group`.

    budget: most tokens of a micro-batch, unless one sample alone has more. None at all if there are no pieces.
    """
    if not found:
        return [[] for _ in range(ranks)]
    step = ranks * group
    budget = max(budget, max(piece.padded for piece in found))
    total = sum(piece.padded for piece in found)
    count = step * max(1, -(-total // (budget * step)))
    while (bins := _fill(found, count, budget)) is None:
        count += step
    filler = MicroBatch((min(found, key=lambda piece: piece.padded),), dummy=True)
    return [[MicroBatch(tuple(own)) if own else filler for own in dealt] for dealt in _deal(bins, ranks)]


Bin = list[Piece]


def _fill(found: Sequence[Piece], count: int, budget: int) -> list[Bin] | None:
    """The pieces in `count` bins of at most `budget` tokens, evenly if that can be; None if they do not fit."""
    ordered = sorted(found, key=lambda piece: (-piece.padded, piece.sample))
    return _evenly(ordered, count, budget) or _tightly(ordered, count, budget)


def _evenly(ordered: Sequence[Piece], count: int, budget: int) -> list[Bin] | None:
    bins: list[Bin] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for piece in ordered:
        load, number = heapq.heappop(loads)
        if load + piece.padded > budget:
            return None
        bins[number].append(piece)
        heapq.heappush(loads, (load + piece.padded, number))
    return bins


def _tightly(ordered: Sequence[Piece], count: int, budget: int) -> list[Bin] | None:
    """Best fit: each to the fullest bin that takes it."""
    bins: list[Bin] = [[] for _ in range(count)]
    room = np.full(count, budget, dtype=np.int64)
    for piece in ordered:
        left = room - piece.padded
        fits = np.flatnonzero(left >= 0)
        if not len(fits):
            return None
        number = int(fits[np.argmin(left[fits])])
        bins[number].append(piece)
        room[number] -= piece.padded
    return bins


def _deal(bins: Sequence[Bin], ranks: int) -> list[list[Bin]]:
    """Equally many bins to each rank, fullest first, each to the rank with least among those with fewest."""
    dealt: list[list[Bin]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for own in sorted(bins, key=lambda own: -sum(piece.padded for piece in own)):
        rank = min(range(ranks), key=lambda each: (len(dealt[each]), loads[each]))
        dealt[rank].append(own)
        loads[rank] += sum(piece.padded for piece in own)
    return dealt


@dataclass(frozen=True)
class Row:
    """A micro-batch on one context-parallel rank, as indices.

    tokens, positions: int64 [N]. bounds: where each sample begins and ends in the whole row, padding included. sources:
    int64 [T], the place in [N] whose output predicts each trained token; targets: int64 [T], those tokens; rows:
    int64 [T], their places in the batch's columns; segments: int64 [T], which of the micro-batch's samples each belongs
    to. samples: int64 [N], the same of each place; left: int64 [N], how many tokens of its sample follow, itself
    included, 0 for padding.
    """

    tokens: Index
    positions: Index
    samples: Index
    left: Index
    bounds: Index
    sources: Index
    targets: Index
    rows: Index
    segments: Index

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(np.diff(self.bounds).max())


def row(batch: Batch, micro: MicroBatch, cut: Cut, rank: int = 0, skipped: int = 0) -> Row:
    """The indices of a micro-batch on context-parallel rank `rank`.

    skipped: tokens between a place and the trained token that it predicts: 0 for the model itself, more for layers that
    predict further tokens.
    """
    lengths = [piece.padded for piece in micro.pieces]
    own = sum(lengths) // cut.context
    lengths[-1] += _fill_up(own, cut)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    parts = [
        _piece(batch, piece, length, int(start) // cut.context, number, cut.context, rank, skipped)
        for number, (piece, length, start) in enumerate(zip(micro.pieces, lengths, bounds[:-1], strict=True))
    ]
    tokens, positions, samples, left, sources, rows, segments = map(np.concatenate, zip(*parts, strict=True))
    return Row(
        tokens=tokens,
        positions=positions,
        samples=samples,
        left=left,
        bounds=bounds,
        sources=sources,
        targets=batch["tokens"][rows].astype(np.int64),
        rows=rows,
        segments=segments,
    )


def _fill_up(own: int, cut: Cut) -> int:
    """Tokens that the last sample gets more, so that each rank's part is a multiple and every sample can be cut."""
    more = 0
    while (own + more // cut.context) % cut.multiple:
        more += cut.padded(1)
    return more


def _piece(
    batch: Batch, piece: Piece, length: int, first: int, number: int, context: int, rank: int, skipped: int
) -> tuple[Index, ...]:
    """One sample on one rank, whose part of it begins at `first` of the rank's row: fields of `Row`."""
    start, end = int(batch.cu_seqlens[piece.sample]), int(batch.cu_seqlens[piece.sample + 1])
    places = _places(length, context, rank)
    padding = places >= piece.length
    tokens = batch["tokens"][start + np.where(padding, 0, places)].astype(np.int64)
    where = np.full(length, -1, dtype=np.int64)
    where[places] = first + np.arange(len(places))
    trained = np.flatnonzero(batch["mask"][start:end])
    trained = trained[trained > skipped]
    sources = where[trained - 1 - skipped]
    trained, sources = trained[sources >= 0], sources[sources >= 0]
    left = np.maximum(piece.length - places, 0)
    samples, segments = (np.full(len(own), number, dtype=np.int64) for own in (places, trained))
    return tokens, places, samples, left, sources, start + trained, segments


def _places(length: int, context: int, rank: int) -> Index:
    """Places in a sample that a rank holds."""
    if context == 1:
        return np.arange(length, dtype=np.int64)
    part = length // (2 * context)
    own = (rank, 2 * context - 1 - rank)
    return np.concatenate([np.arange(each * part, (each + 1) * part) for each in own]).astype(np.int64)
