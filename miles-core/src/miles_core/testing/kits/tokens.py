"""Trained tokens of a few samples, as tensors: what losses and corrections are tried on; and options that switch on
what a component reads.

Shapes: N all tokens; T trained tokens of a micro-batch. Everything is float64, so that sums in another order agree.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from miles_core.errors import UserError
from miles_core.roles import LossInputs, Segments
from miles_core.testing.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = (5, 1, 8, 3, 6)
"""Tokens of each sample."""

MICRO_BATCHES: Mapping[str, Sequence[Sequence[int]]] = {
    "in another order": ((3, 0, 4, 2, 1),),
    "a sample at a time": ((0,), (1,), (2,), (3,), (4,)),
    "in two micro-batches, or over two ranks": ((4, 0), (2, 1, 3)),
}
"""Ways to split the samples that must not make a difference."""

TOP = 3
"""Likeliest tokens of a teacher."""

TOLERANCE = 1e-9
LATE_S = 20.0


@dataclass(frozen=True)
class Tokens:
    """Columns [N], or [N, TOP], by their names in `LossInputs` and `CriticInputs`; weights [N]; mask, sample [N] as
    numpy arrays."""

    columns: Mapping[str, Tensor]
    weights: Tensor
    mask: np.ndarray[Any, np.dtype[np.bool_]]
    sample: np.ndarray[Any, np.dtype[np.int64]]

    def rows(self, samples: Sequence[int]) -> Tensor:
        """Places of the trained tokens of these samples, in their order, int64 [T]."""
        import torch

        places = [np.flatnonzero((self.sample == sample) & self.mask) for sample in samples]
        return torch.from_numpy(np.concatenate(places))

    def segments(self, samples: Sequence[int]) -> Segments:
        """Which of these samples each of their trained tokens belongs to."""
        import torch

        counts = [int(((self.sample == sample) & self.mask).sum()) for sample in samples]
        return Segments(ids=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)), count=len(counts))


def make_tokens(*, spread: float = 0.3, advantage: float = 1.0, seed: int = 0) -> Tokens:
    """spread: how far log-probabilities of different policies lie apart; advantage: how large advantages are."""
    import torch

    rng = np.random.default_rng(seed)
    total = sum(LENGTHS)
    mask = rng.random(total) > 0.2
    mask[np.cumsum(LENGTHS) - 1] = True  # every sample has a trained token

    def normal(scale: float = 1.0, around: Any = 0.0) -> Tensor:
        return torch.from_numpy(around + scale * rng.standard_normal(total))

    base = -0.2 - 3 * rng.random(total)
    columns = {name: normal(spread, base) for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")}
    columns |= {
        "logprobs": normal(spread, base),
        "advantages": normal(advantage),
        "returns": normal(),
        "old_values": normal(),
        "values": normal(),
        "entropy": torch.from_numpy(0.1 + rng.random(total)),
    }
    teacher, policy = _top(spread, rng)
    columns |= {"teacher_logprobs": normal(spread, base), "teacher_top_logprobs": teacher, "top_logprobs": policy}
    columns |= {
        field.name: torch.from_numpy(rng.random(total))
        for field in fields(LossInputs)
        if field.name not in columns and field.name != "segments"
    }
    return Tokens(columns, normal().abs() * torch.from_numpy(mask), mask, np.repeat(np.arange(len(LENGTHS)), LENGTHS))


def _top(spread: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a teacher and of a policy at the teacher's `TOP` likeliest of some tokens, [N, TOP] each."""
    import torch

    shape = (sum(LENGTHS), 2 * TOP)
    base = rng.standard_normal(shape)
    teacher, policy = (torch.from_numpy(base + spread * rng.standard_normal(shape)).log_softmax(-1) for _ in range(2))
    top = teacher.topk(TOP)
    return top.values, policy.gather(1, top.indices)


# ---- Options that switch things on ----------------------------------------------------------------------------------


def switched(subject: Subject[Any], option: str, *, on: bool) -> Mapping[str, Any] | None:
    """Changes of options that make the (perhaps dotted) `option` truthy or falsy; None if none is accepted."""
    for value in (True, 0.1, 1) if on else (False, 0.0, 0):
        change: Any = value
        for part in reversed(option.split(".")):
            change = {part: change}
        try:
            subject.options(**change)
        except UserError:
            continue
        assert isinstance(change, dict)
        return change
    return None


def configurations(subject: Subject[Any]) -> Iterator[tuple[str, Mapping[str, Any], frozenset[str]]]:
    """(in words, changes of options, needed columns) with everything optional off, and each thing on by itself."""
    spec = subject.spec
    switches = dict.fromkeys((*spec.needs_if.values(), *filter(None, [getattr(spec, "entropy_if", None)])))
    off: dict[str, Any] = {}
    for option in switches:
        off |= switched(subject, option, on=False) or {}
    yield "with everything optional off", off, needed(subject, off)
    for option in switches:
        on = switched(subject, option, on=True)
        if on is not None:
            yield f"with {option} on", {**off, **on}, needed(subject, {**off, **on})


def needed(subject: Subject[Any], changes: Mapping[str, Any]) -> frozenset[str]:
    """The columns that the record says it needs with its example's options and these changes, entropy among them."""
    spec, options = subject.spec, subject.options(**changes)
    asked = {column for column, option in spec.needs_if.items() if attrgetter(option)(options)}
    entropy = getattr(spec, "entropy_if", None)
    return frozenset(spec.needs | asked | ({"entropy"} if entropy and attrgetter(entropy)(options) else set()))


# ---- Two context-parallel ranks -------------------------------------------------------------------------------------


class TwoRanks:
    """Runs a function as two ranks that share every sample; `Segments.reduce` adds their partial sums.

    The ranks are threads, so that one backward pass goes through both.
    """

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=LATE_S)
        self._sums: list[Any] = [None, None]

    def run(self, function: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> Iterator[Any]:
        """`function(rank, reduce)` of both; raises what one of them raises."""
        results: list[Any] = [None, None]

        def rank(number: int) -> None:
            try:
                results[number] = function(number, lambda sums: self._reduce(number, sums))
            except BaseException as error:
                results[number] = error
                self._barrier.abort()

        threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        yield from results

    def _reduce(self, number: int, sums: Tensor) -> Tensor:
        self._sums[number] = sums
        self._barrier.wait()
        both: Tensor = self._sums[0] + self._sums[1]
        self._barrier.wait()
        return both


def halves(tokens: Tokens) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(rows, segment ids) of both ranks: every sample's trained tokens are dealt to them in turn."""
    everything = range(len(LENGTHS))
    rows, ids = tokens.rows(everything), tokens.segments(everything).ids
    return (rows[0::2], ids[0::2]), (rows[1::2], ids[1::2])
