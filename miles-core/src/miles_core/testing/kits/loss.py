"""Rules of a loss: it is tried on trained tokens of five samples, on the CPU, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from miles_core.roles import CriticInputs, LossInputs, LossOutputs, Segments
from miles_core.specs import TOKEN_COLUMNS, LossSpec
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
from miles_core.testing.subject import Subject, skip

if TYPE_CHECKING:
    from torch import Tensor

Inputs = LossInputs | CriticInputs

OF_POLICY: Mapping[str, str] = {
    **{field.name: field.name for field in fields(LossInputs) if field.name in TOKEN_COLUMNS},
    "teacher_top_tokens": "top_logprobs",
}
OF_CRITIC: Mapping[str, str] = {"returns": "returns", "values": "old_values"}
"""Token column -> the field of `LossInputs` or `CriticInputs` that it becomes."""

WITH_GRADIENT = ("logprobs", "values", "entropy", "top_logprobs")


def _columns(spec: LossSpec) -> Mapping[str, str]:
    """The token columns that a loss can read, and the fields that they become."""
    return OF_CRITIC if spec.trains == "critic" else OF_POLICY


def gives_a_finite_loss_for_each_token(subject: Subject[LossSpec]) -> Iterator[str]:
    """In float32, losses, penalties and metrics are finite, one a trained token, and metrics have no gradient."""
    for label, tokens in _cases():
        single = {name: column.float() for name, column in tokens.columns.items()}
        outputs = _call(subject, _leaves(replace(tokens, columns=single)), range(len(LENGTHS)))
        parts = {"losses": outputs.losses, **{f"metric {name}": item for name, item in outputs.metrics.items()}}
        parts |= {} if outputs.penalties is None else {"penalties": outputs.penalties}
        for name, values in parts.items():
            yield from (f"{label}: {name} {fault}" for fault in _value_faults(values, int(tokens.mask.sum())))
        yield from (f"metric {name} has a gradient" for name, item in outputs.metrics.items() if item.requires_grad)
        if subject.spec.trains == "critic" and outputs.penalties is not None:
            yield "it gives penalties, which a critic has none of"


def _cases() -> Iterable[tuple[str, Tokens]]:
    return (
        ("ordinary tokens", make_tokens()),
        ("equal policies", make_tokens(spread=0)),
        ("no advantage", make_tokens(advantage=0)),
        ("policies far apart", make_tokens(spread=15)),
    )


def _value_faults(values: Tensor, count: int) -> Iterator[str]:
    import torch

    if tuple(values.shape) != (count,):
        yield f"have the shape {tuple(values.shape)} for {count} trained tokens"
    elif not torch.isfinite(values).all():
        yield f"are not finite: {values[~torch.isfinite(values)][0].item()}"


def has_a_gradient(subject: Subject[LossSpec]) -> Iterator[str]:
    """On ordinary tokens something is learnt: the objective has a gradient that is not 0 everywhere."""
    _, gradients = _objective(subject, make_tokens(), (range(len(LENGTHS)),))
    if not any(gradient.any() for gradient in gradients.values()):
        yield "nothing that the trained model predicts has a gradient: a run would learn nothing"


def gives_masked_tokens_no_gradient(subject: Subject[LossSpec]) -> Iterator[str]:
    """Masked tokens, and samples whose weights are 0, have no gradient, whatever the others do."""
    import torch

    _skip_if_samples_are_compared(subject)
    tokens = make_tokens()
    untrained = torch.from_numpy((tokens.sample == 2) | ~tokens.mask)
    tokens = replace(tokens, weights=tokens.weights.masked_fill(untrained, 0.0))
    _, gradients = _objective(subject, tokens, (range(len(LENGTHS)),))
    for name, gradient in gradients.items():
        if (gradient[untrained] != 0).any():
            yield f"the gradient of {name} is {gradient[untrained].abs().max().item():.3g} where nothing is trained"


def does_not_depend_on_packing(subject: Subject[LossSpec]) -> Iterator[str]:
    """Sum and gradient are the same in any order, over micro-batches, and over data- and context-parallel ranks."""
    _skip_if_samples_are_compared(subject)
    tokens = make_tokens()
    whole = _objective(subject, tokens, (range(len(LENGTHS)),))
    for label, parts in MICRO_BATCHES.items():
        yield from _differences(label, whole, _objective(subject, tokens, parts))
    yield from _differences("with each sample over two context-parallel ranks", whole, _on_two_ranks(subject, tokens))


Objective = tuple["Tensor", Mapping[str, "Tensor"]]


def _differences(label: str, expected: Objective, got: Objective) -> Iterator[str]:
    if abs(float(expected[0] - got[0])) > TOLERANCE * max(1.0, abs(float(expected[0]))):
        yield f"{label}, the sum is {float(got[0]):.9g} and not {float(expected[0]):.9g}"
    for name, gradient in expected[1].items():
        apart = float((gradient - got[1][name]).abs().max())
        if apart > TOLERANCE * max(1.0, float(gradient.abs().max())):
            yield f"{label}, the gradient of {name} differs by {apart:.3g}"


def _skip_if_samples_are_compared(subject: Subject[LossSpec]) -> None:
    if subject.spec.compares_samples:
        skip("its record says that it compares the samples of a micro-batch")


def needs_exactly_what_it_reads(subject: Subject[LossSpec]) -> Iterator[str]:
    """Every column that the record says it needs is read, and no other one makes a difference."""
    spec, tokens, known = subject.spec, make_tokens(), _columns(subject.spec)
    for column in sorted((spec.needs | frozenset(spec.needs_if)) - known.keys()):
        yield f"it needs {column}, which no such loss can read"
    everything = frozenset(known) | {"entropy"}
    for label, changes, declared in configurations(subject):
        alone, read = _spied(subject, tokens, declared, changes)
        for column in sorted(declared & everything):
            if known.get(column, column) not in read:
                yield f"{label}, it needs {column} and does not read it"
        given, _ = _spied(subject, tokens, everything, changes)
        if not _same(alone, given):
            yield f"{label}, the result depends on a column that its record does not say it needs"


def _spied(
    subject: Subject[LossSpec], tokens: Tokens, columns: frozenset[str], changes: Mapping[str, Any]
) -> tuple[LossOutputs, set[str]]:
    """What the loss gives, and the fields that it has read."""
    read: set[str] = set()
    given = _inputs(subject, tokens, range(len(LENGTHS)), columns)
    names = {field.name for field in fields(given)}

    class Spy(type(given)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                read.add(name)
            return super().__getattribute__(name)

    spy = Spy(**{name: getattr(given, name) for name in names})
    return subject.target(spy, subject.options(**changes)), read


def _same(left: LossOutputs, right: LossOutputs) -> bool:
    import torch

    if (left.penalties is None) != (right.penalties is None) or not torch.equal(left.losses, right.losses):
        return False
    return left.penalties is None or right.penalties is None or torch.equal(left.penalties, right.penalties)


def is_a_pure_function(subject: Subject[LossSpec]) -> Iterator[str]:
    """The same inputs give the same losses, and are not changed."""
    inputs = _inputs(subject, make_tokens(), range(len(LENGTHS)), needed(subject, {}))
    given = {field.name: getattr(inputs, field.name) for field in fields(inputs) if field.name != "segments"}
    before = {name: tensor.clone() for name, tensor in given.items() if tensor is not None}
    first, second = (_outputs(subject, inputs) for _ in range(2))
    yield from (f"it changes {name} in place" for name, tensor in before.items() if not given[name].equal(tensor))
    if not _same(first, second):
        yield "a second call with the same inputs gives something else"


# ---- Calling a loss -------------------------------------------------------------------------------------------------


def _inputs(subject: Subject[LossSpec], tokens: Tokens, samples: Any, columns: frozenset[str]) -> Inputs:
    """A critic's loss gets all of its three columns, whatever its record says."""
    rows, segments = tokens.rows(samples), tokens.segments(samples)
    if subject.spec.trains == "critic":
        whole = ("values", "returns", "old_values")
        return CriticInputs(segments=segments, **{name: tokens.columns[name][rows] for name in whole})
    names = {"logprobs"} | {OF_POLICY.get(column, column) for column in columns}
    return LossInputs(segments=segments, **{name: tokens.columns[name][rows] for name in names & tokens.columns.keys()})


def _call(subject: Subject[LossSpec], tokens: Tokens, samples: Any) -> LossOutputs:
    return _outputs(subject, _inputs(subject, tokens, samples, needed(subject, {})))


def _outputs(subject: Subject[LossSpec], inputs: Inputs) -> LossOutputs:
    outputs = subject.target(inputs, subject.options())
    if not isinstance(outputs, LossOutputs):
        raise TypeError(f"it gave a {type(outputs).__name__}; it must give LossOutputs")
    return outputs


def _leaves(tokens: Tokens) -> Tokens:
    """The same with gradients to be had."""
    leaves = {name: tokens.columns[name].clone().requires_grad_() for name in WITH_GRADIENT}
    return replace(tokens, columns={**tokens.columns, **leaves})


def _total(outputs: LossOutputs, weights: Tensor) -> Tensor:
    losses = outputs.losses if outputs.penalties is None else outputs.losses + outputs.penalties
    total: Tensor = (weights * losses).sum()
    return total


def _gradients(total: Tensor, tokens: Tokens) -> Objective:
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    columns = {name: tokens.columns[name] for name in WITH_GRADIENT}
    return total.detach(), {
        name: column.new_zeros(column.shape) if column.grad is None else column.grad for name, column in columns.items()
    }


def _objective(subject: Subject[LossSpec], tokens: Tokens, parts: Any) -> Objective:
    """The sum over micro-batches, and its gradients."""
    tokens = _leaves(tokens)
    totals = [_total(_call(subject, tokens, part), tokens.weights[tokens.rows(part)]) for part in parts]
    return _gradients(sum(totals[1:], totals[0]), tokens)


def _on_two_ranks(subject: Subject[LossSpec], tokens: Tokens) -> Objective:
    tokens = _leaves(tokens)
    options, split = subject.options(), halves(tokens)
    whole = _inputs(subject, tokens, range(len(LENGTHS)), needed(subject, {}))
    given = {field.name for field in fields(whole) if getattr(whole, field.name) is not None} - {"segments"}

    def rank(number: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        rows, ids = split[number]
        segments = Segments(ids=ids, count=len(LENGTHS), reduce=reduce)
        columns: dict[str, Any] = {name: tokens.columns[name][rows] for name in given}
        inputs = replace(whole, segments=segments, **columns)
        return _total(subject.target(inputs, options), tokens.weights[rows])

    first, second = TwoRanks().run(rank)
    return _gradients(first + second, tokens)


RULES = (
    gives_a_finite_loss_for_each_token,
    has_a_gradient,
    gives_masked_tokens_no_gradient,
    does_not_depend_on_packing,
    needs_exactly_what_it_reads,
    is_a_pure_function,
)
