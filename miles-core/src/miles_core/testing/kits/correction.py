"""Rules of a correction: it is tried on trained tokens of five samples, on the CPU, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from miles_core.roles import CorrectionInputs, CorrectionOutputs, Segments
from miles_core.specs import CorrectionSpec
from miles_core.testing.kits.tokens import (
    LENGTHS,
    MICRO_BATCHES,
    TOLERANCE,
    Tokens,
    TwoRanks,
    configurations,
    halves,
    make_tokens,
    needed,
)
from miles_core.testing.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

EVERYTHING = range(len(LENGTHS))
READABLE = frozenset({"advantages", "old_logprobs", "rollout_logprobs"})
"""Token columns that become a field of `CorrectionInputs`."""


def gives_a_weight_for_each_token(subject: Subject[CorrectionSpec]) -> Iterator[str]:
    """Weights are finite, not negative, one a trained token, and without gradient; so are metrics, but for the sign."""
    import torch

    for label, tokens in (("ordinary tokens", make_tokens()), ("policies far apart", make_tokens(spread=15))):
        outputs = _call(subject, tokens, EVERYTHING)
        for name, values in {"weights": outputs.weights, **outputs.metrics}.items():
            if tuple(values.shape) != (int(tokens.mask.sum()),):
                yield f"{label}: {name} have the shape {tuple(values.shape)} for {int(tokens.mask.sum())} tokens"
            elif not torch.isfinite(values).all():
                yield f"{label}: {name} are not finite"
            elif values.requires_grad:
                yield f"{name} have a gradient; a correction is a constant to the loss"
        if (outputs.weights < 0).any():
            yield f"{label}: a weight is {outputs.weights.min().item():.3g}"


def leaves_tokens_of_the_same_policy_alone(subject: Subject[CorrectionSpec]) -> Iterator[str]:
    """Where the rollout's policy and the trained one agree, every weight is 1."""
    tokens = make_tokens(spread=0)
    weights = _call(subject, tokens, EVERYTHING).weights
    if (weights - 1).abs().max() > TOLERANCE:
        yield f"equal log-probabilities have weights from {weights.min().item():.6g} to {weights.max().item():.6g}"


def does_not_depend_on_packing(subject: Subject[CorrectionSpec]) -> Iterator[str]:
    """Weights are the same in any order, over micro-batches, and over data- and context-parallel ranks."""
    tokens = make_tokens()
    expected = _spread(tokens, [(_call(subject, tokens, EVERYTHING).weights, tokens.rows(EVERYTHING))])
    ways = {
        label: [(_call(subject, tokens, part).weights, tokens.rows(part)) for part in parts]
        for label, parts in MICRO_BATCHES.items()
    }
    ways["with each sample over two context-parallel ranks"] = _on_two_ranks(subject, tokens)
    for label, parts in ways.items():
        apart = float((_spread(tokens, parts) - expected).abs().max())
        if apart > TOLERANCE:
            yield f"{label}, a weight differs by {apart:.3g}"


def needs_exactly_what_it_reads(subject: Subject[CorrectionSpec]) -> Iterator[str]:
    """Columns that the record does not say it needs make no difference; advantages, where it does, are read."""
    spec, tokens = subject.spec, make_tokens()
    for column in sorted((spec.needs | frozenset(spec.needs_if)) - READABLE):
        yield f"it needs {column}, which no correction can read"
    for label, changes, declared in configurations(subject):
        alone = _call(subject, tokens, EVERYTHING, **changes).weights
        given = _call(subject, tokens, EVERYTHING, everything=True, **changes).weights
        if not alone.equal(given):
            yield f"{label}, the weights depend on the advantages, which its record does not say it needs"
        if "advantages" in declared:
            turned = replace(tokens, columns={**tokens.columns, "advantages": -tokens.columns["advantages"]})
            if given.equal(_call(subject, turned, EVERYTHING, **changes).weights):
                yield f"{label}, it needs advantages, and they make no difference"


def is_a_pure_function(subject: Subject[CorrectionSpec]) -> Iterator[str]:
    """The same inputs give the same weights, and are not changed."""
    tokens = make_tokens()
    inputs = _inputs(tokens, tokens.rows(EVERYTHING), tokens.segments(EVERYTHING), advantages=True)
    given = {field.name: getattr(inputs, field.name) for field in fields(inputs) if field.name != "segments"}
    before = {name: tensor.clone() for name, tensor in given.items()}
    first, second = (subject.target(inputs, subject.options()).weights for _ in range(2))
    yield from (f"it changes {name} in place" for name, tensor in before.items() if not given[name].equal(tensor))
    if not first.equal(second):
        yield "a second call with the same inputs gives something else"


# ---- Calling a correction -------------------------------------------------------------------------------------------


def _inputs(tokens: Tokens, rows: Tensor, segments: Segments, *, advantages: bool) -> CorrectionInputs:
    names = ["logprobs", "old_logprobs", "rollout_logprobs", *(["advantages"] if advantages else [])]
    return CorrectionInputs(segments=segments, **{name: tokens.columns[name][rows] for name in names})


def _call(
    subject: Subject[CorrectionSpec], tokens: Tokens, samples: Any, *, everything: bool = False, **changes: Any
) -> CorrectionOutputs:
    """What it gives with the example's options and `changes`; advantages if it needs them, or if it gets everything."""
    advantages = everything or "advantages" in needed(subject, changes)
    inputs = _inputs(tokens, tokens.rows(samples), tokens.segments(samples), advantages=advantages)
    outputs = subject.target(inputs, subject.options(**changes))
    if not isinstance(outputs, CorrectionOutputs):
        raise TypeError(f"it gave a {type(outputs).__name__}; it must give CorrectionOutputs")
    return outputs


def _spread(tokens: Tokens, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Weights of micro-batches -> [N], 0 where masked."""
    whole = tokens.weights.new_zeros(len(tokens.mask))
    for weights, rows in parts:
        whole = whole.index_put((rows,), weights)
    return whole


def _on_two_ranks(subject: Subject[CorrectionSpec], tokens: Tokens) -> list[tuple[Tensor, Tensor]]:
    options, split = subject.options(), halves(tokens)
    advantages = "advantages" in needed(subject, {})

    def rank(number: int, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        rows, ids = split[number]
        segments = Segments(ids=ids, count=len(LENGTHS), reduce=reduce)
        outputs = subject.target(_inputs(tokens, rows, segments, advantages=advantages), options)
        return outputs.weights, rows

    return list(TwoRanks().run(rank))


RULES = (
    gives_a_weight_for_each_token,
    leaves_tokens_of_the_same_policy_alone,
    does_not_depend_on_packing,
    needs_exactly_what_it_reads,
    is_a_pure_function,
)
