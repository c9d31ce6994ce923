"""Rules of an advantage: it is tried on batches of random rewards, through the checks that a run makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles_core.config.schema import Component
from miles_core.roles import AdvantageInputs
from miles_core.run.advantages import apply_advantage
from miles_core.sample import Batch
from miles_core.specs import AdvantageSpec
from miles_core.testing.fakes import make_batch
from miles_core.testing.kits.tokens import configurations
from miles_core.testing.subject import Subject, skip

TOLERANCE = 1e-3
"""Of a law, relative: what is added to a standard deviation against a division by zero bends them a little."""


def gives_finite_columns(subject: Subject[AdvantageSpec]) -> Iterator[str]:
    """It gives the columns that its record says, finite and 0 where masked, for ordinary, equal and huge rewards."""
    batch = make_batch()
    rewards = batch.samples["reward"]
    cases = {"ordinary": rewards, "equal": np.ones_like(rewards), "huge": 1e8 * rewards, "negative": -rewards}
    for values in cases.values():
        _apply(subject, _with_rewards(batch, values))  # raises what is wrong
    yield from ()


def survives_groups_of_one(subject: Subject[AdvantageSpec]) -> Iterator[str]:
    """A sample without siblings gets a finite advantage, alone and among others; and so does a single one."""
    for sizes in ((1,), (1, 1, 1), (3, 1)):
        _apply(subject, make_batch(sizes))
    yield from ()


def ignores_the_order_of_samples(subject: Subject[AdvantageSpec]) -> Iterator[str]:
    """Samples in another order have the same advantages."""
    batch = _prepared(subject, make_batch())
    order = np.random.default_rng(1).permutation(len(batch))
    expected = _apply(subject, batch).select(order)
    got = _apply(subject, batch.select(order))
    for name in sorted(subject.spec.gives):
        apart = np.abs(expected[name] - got[name]).max()
        if apart > 1e-9:
            yield f"in another order, {name} differ by {apart:.3g}"


def compares_within_groups(subject: Subject[AdvantageSpec]) -> Iterator[str]:
    """Where it compares the samples of a prompt, as much more reward for all of them changes nothing."""
    if not subject.spec.groups:
        skip("its record does not say that it compares the samples of a prompt")
    batch = make_batch()
    rewards, groups = batch.samples["reward"], batch.samples["group"]
    more = np.array([0.5, -2.0, 7.0])[groups]
    apart = _apart(_advantages(subject, batch), _advantages(subject, _with_rewards(batch, rewards + more)))
    if apart > TOLERANCE:
        yield f"adding a constant to the rewards of each prompt changes advantages by {apart:.3g}, relatively"


def keeps_the_scale_of_rewards(subject: Subject[AdvantageSpec]) -> Iterator[str]:
    """Rewards in another unit give the same advantages, or the same in that unit."""
    if subject.spec.needs:
        skip(f"its advantages also depend on {', '.join(sorted(subject.spec.needs))}")
    batch = make_batch()
    one = _advantages(subject, batch)
    two = _advantages(subject, _with_rewards(batch, 2 * batch.samples["reward"]))
    factor = float(one @ two) / max(float(one @ one), 1e-30)
    if _apart(factor * one, two) > TOLERANCE or min(abs(factor - 1), abs(factor - 2)) > TOLERANCE:
        yield "twice the rewards give neither the same advantages nor twice as much"


def needs_exactly_what_it_reads(subject: Subject[AdvantageSpec]) -> Iterator[str]:
    """Every column that the record says it needs is read, and there is no other one, whatever is switched on."""
    batch, read = _prepared(subject, make_batch()), set[str]()
    for label, changes, declared in configurations(subject):
        spy = _Spy({name: batch[name] for name in declared})
        try:
            subject.target(replace(_inputs(batch), columns=spy), subject.options(**changes))
        except KeyError:
            if spy.read <= declared:
                raise
        others = ", ".join(map(repr, sorted(spy.read - declared)))
        if others:
            yield f"{label}, it reads the column {others}, which its record does not say it needs"
            return
        read |= spy.read  # what is read instead of something else may be said to be needed beside it
        asked = declared - subject.spec.needs
        yield from (f"{label}, it needs {name} and does not read it" for name in sorted(asked - spy.read))
    yield from (f"it needs {name} and does not read it" for name in sorted(subject.spec.needs - read))


class _Spy(dict[str, NDArray[Any]]):
    """Columns that know which of them were asked for."""

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(columns)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> NDArray[Any]:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def is_a_pure_function(subject: Subject[AdvantageSpec]) -> Iterator[str]:
    """The same inputs give the same advantages, and are not changed."""
    batch = _prepared(subject, make_batch())
    names = {*subject.spec.needs}
    inputs = replace(_inputs(batch), columns={name: batch[name] for name in names})
    before = replace(inputs, rewards=inputs.rewards.copy(), columns={name: batch[name].copy() for name in names})
    first, second = _call(subject, inputs), _call(subject, inputs)
    if any(not np.array_equal(first[name], second[name]) for name in first):
        yield "a second call with the same inputs gives something else"
    if not np.array_equal(before.rewards, inputs.rewards):
        yield "it changes the rewards in place"
    yield from (
        f"it changes {name} in place" for name in names if not np.array_equal(before.columns[name], batch[name])
    )


# ---- Calling an advantage -------------------------------------------------------------------------------------------


def _prepared(subject: Subject[AdvantageSpec], batch: Batch) -> Batch:
    """With the columns that are needed, and the last sample of each group as its baseline if it asks for that."""
    rng = np.random.default_rng(2)
    missing = {name for name in subject.spec.needs | frozenset(subject.spec.needs_if) if name not in batch}
    batch = batch.with_columns(**{name: -rng.random(batch.tokens_total) for name in sorted(missing)})
    if not subject.spec.baseline or batch.samples["baseline"].any():
        return batch
    groups = batch.samples["group"]
    last = np.append(groups[1:] != groups[:-1], True)
    mask = batch["mask"] & ~last[batch.segment_ids]
    return batch.with_samples(baseline=last).with_columns(mask=mask)


def _with_rewards(batch: Batch, rewards: NDArray[np.float64]) -> Batch:
    return replace(batch.with_samples(reward=rewards), reward_parts={"fake": rewards})


def _apply(subject: Subject[AdvantageSpec], batch: Batch) -> Batch:
    component = Component(spec=subject.spec, plugin=subject.plugin.name, options=subject.options())
    return apply_advantage(_prepared(subject, batch), component)


def _advantages(subject: Subject[AdvantageSpec], batch: Batch) -> NDArray[np.float64]:
    name = "advantages" if "advantages" in subject.spec.gives else min(subject.spec.gives)
    column: NDArray[np.float64] = _apply(subject, batch)[name]
    return column


def _apart(expected: NDArray[np.float64], got: NDArray[np.float64]) -> float:
    return float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-12))


def _inputs(batch: Batch) -> AdvantageInputs:
    return AdvantageInputs(
        rewards=batch.samples["reward"],
        reward_parts=batch.reward_parts,
        reward_weights=batch.reward_weights,
        groups=batch.samples["group"],
        baseline=batch.samples["baseline"],
        segment_ids=batch.segment_ids,
        mask=batch["mask"],
    )


def _call(subject: Subject[AdvantageSpec], inputs: AdvantageInputs) -> Mapping[str, NDArray[np.float64]]:
    given: Mapping[str, NDArray[np.float64]] = subject.target(inputs, subject.options())
    return given


RULES = (
    gives_finite_columns,
    survives_groups_of_one,
    ignores_the_order_of_samples,
    compares_within_groups,
    keeps_the_scale_of_rewards,
    needs_exactly_what_it_reads,
    is_a_pure_function,
)
