"""How the samples of a mini-batch become micro-batches: plain numpy, the same on every rank.

Every data-parallel rank gets equally many micro-batches, because pipelines and expert groups run in step, and as few as
the token budget allows. Their number is chosen first: the least multiple of the ranks that holds all tokens. Samples
go, longest first, to the emptiest micro-batch; where the budget does not allow that, each goes to the fullest that
still takes it. Then samples are exchanged between the fullest and the emptiest until all are even; and once more
between ranks, to which micro-batches are dealt fullest first. What depends on no packing is left out: a sample's tokens
from its last trained one on, and samples without any.

How full micro-batches are is so decided by the samples: with n of them and a budget of b, their tokens / (n b).

Context parallelism cuts each sample into 2 C parts, of which rank c holds part c and part 2 C - 1 - c, so that causal
attention costs every rank the same. Samples are padded at their end to a length that can be cut so.

Shapes: N tokens of a rank's packed row; T trained tokens among those it predicts; C context-parallel ranks.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
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

    budget: most tokens of a micro-batch, unless one sample alone has more; then that is the budget. None at all if
    there are no pieces. Every piece is in one micro-batch that counts, and none is over the budget: that always holds.
    That micro-batches are as few as can be, and their sums even, is found by heuristics and not proved.
    """
    if not found:
        return [[] for _ in range(ranks)]
    step = ranks * group
    budget = max(budget, max(piece.padded for piece in found))
    total = sum(piece.padded for piece in found)
    count = step * max(1, -(-total // (budget * step)))
    while (bins := _fill(found, count, budget)) is None:
        count += step
    dealt = _deal(bins, ranks)
    _even_ranks(dealt, budget)
    filler = MicroBatch((min(found, key=lambda piece: piece.padded),), dummy=True)
    return [[MicroBatch(tuple(own)) if own else filler for own in each] for each in dealt]


Bin = list[Piece]

_EVEN = 1e-3
"""Sums that differ by less, relative to their mean, are left as they are."""
_TRIES = 8
"""As many of the emptiest are tried before the fullest is taken for as empty as it can be."""


def _load(own: Bin) -> int:
    return sum(piece.padded for piece in own)


def _fill(found: Sequence[Piece], count: int, budget: int) -> list[Bin] | None:
    """The pieces in `count` bins of at most `budget` tokens, evened out; None if they were not made to fit."""
    ordered = sorted(found, key=lambda piece: (-piece.padded, piece.sample))
    bins = _emptiest_first(ordered, count)
    if _even_bins(bins) <= budget:
        return bins
    tight = _best_fit(ordered, count, budget)
    if tight is not None:
        _even_bins(tight)
    return tight


def _emptiest_first(ordered: Sequence[Piece], count: int) -> list[Bin]:
    """Each piece into the emptiest bin, whatever the budget."""
    bins: list[Bin] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for piece in ordered:
        load, number = loads[0]
        bins[number].append(piece)
        heapq.heapreplace(loads, (load + piece.padded, number))
    return bins


def _best_fit(ordered: Sequence[Piece], count: int, budget: int) -> list[Bin] | None:
    """Each piece into the fullest bin that takes it; None if there is none."""
    bins: list[Bin] = [[] for _ in range(count)]
    rooms = [(budget, number) for number in range(count)]  # ascending
    for piece in ordered:
        place = bisect_left(rooms, (piece.padded, 0))
        if place == count:
            return None
        room, number = rooms.pop(place)
        bins[number].append(piece)
        insort(rooms, (room - piece.padded, number))
    return bins


def _even_bins(bins: list[Bin]) -> int:
    """Exchanges pieces of the fullest bin for pieces of an emptier one while that helps: no bin gets fuller than the
    fullest was. Gives the sum of the fullest."""
    ascending = sorted((_load(own), number) for number, own in enumerate(bins))
    least = _EVEN * sum(load for load, _ in ascending) / len(bins)
    for _ in range(4 * len(bins)):  # in practice it ends long before
        most, fullest = ascending[-1]
        for place, (load, number) in enumerate(ascending[:_TRIES]):
            gap = most - load
            if gap > least and (moved := _exchange(bins[fullest], bins[number], gap, room=gap)):
                del ascending[-1], ascending[place]
                insort(ascending, (most - moved, fullest))
                insort(ascending, (load + moved, number))
                break
        else:
            break
    return ascending[-1][0]


def _exchange(fuller: Bin, emptier: Bin, gap: int, room: int) -> int:
    """Moves a piece, or exchanges two, so that about half of `gap`, and at most `room`, goes over. Gives how much, 0
    if nothing makes the gap smaller."""
    own = np.array([piece.padded for piece in fuller])
    other = np.array([piece.padded for piece in emptier] + [0] * (len(fuller) > 1))  # 0: for nothing
    if not len(own) or not len(other):
        return 0
    more = np.subtract.outer(own, other)
    helps = (more > 0) & (more < gap) & (more <= room)
    if not helps.any():
        return 0
    best = int(np.where(helps, np.abs(2 * more - gap), np.iinfo(np.int64).max).argmin())
    here, there = divmod(best, len(other))
    piece = fuller.pop(here)
    if there < len(emptier):
        fuller.append(emptier.pop(there))
    emptier.append(piece)
    return int(more[here, there])


def _deal(bins: Sequence[Bin], ranks: int) -> list[list[Bin]]:
    """Equally many bins to each rank, fullest first, each to the rank with least among those with fewest."""
    dealt: list[list[Bin]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for own in sorted(bins, key=_load, reverse=True):
        rank = min(range(ranks), key=lambda each: (len(dealt[each]), loads[each]))
        dealt[rank].append(own)
        loads[rank] += _load(own)
    return dealt


def _even_ranks(dealt: Sequence[list[Bin]], budget: int) -> None:
    """The same for ranks, between bins of the fullest and of the emptiest: a sample that fills a bin by itself makes
    its rank fuller than all others, and room in that rank's other bins makes up for it."""
    loads = np.array([sum(map(_load, own)) for own in dealt])
    for _ in range(4 * len(dealt)):
        fullest, emptiest = int(loads.argmax()), int(loads.argmin())
        gap = int(loads[fullest] - loads[emptiest])
        if gap <= _EVEN * loads.mean():
            return
        for own, other in zip(dealt[fullest], dealt[emptiest], strict=True):
            if moved := _exchange(own, other, gap, room=budget - _load(other)):
                loads[fullest] -= moved
                loads[emptiest] += moved
                break
        else:
            return


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
