"""Rules of a filter: it is asked about made-up groups, among them strange ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from miles_core.sample import Group
from miles_core.specs import FilterSpec
from miles_core.testing.fakes import make_group, make_sample
from miles_core.testing.subject import Subject


def answers_true_or_false(subject: Subject[FilterSpec]) -> Iterator[str]:
    """Of any scored group it says whether to keep it: of equal rewards, of one sample, of failed and aborted ones."""
    chosen = subject.make()
    for label, group in _groups(subject).items():
        answer = chosen.keep(group)
        if not isinstance(answer, (bool, np.bool_)):
            yield f"of {label} it says {answer!r}"


def keeps_what_it_kept(subject: Subject[FilterSpec]) -> Iterator[str]:
    """What it has kept once it keeps again, and changes nothing in it: filtering twice is filtering once."""
    groups = _groups(subject)
    before = {label: _fingerprint(group) for label, group in groups.items()}
    chosen = subject.make()
    kept = [label for label, group in groups.items() if chosen.keep(group)]
    again = [label for label in kept if chosen.keep(groups[label])]
    yield from (f"it keeps {label} once and then drops it" for label in kept if label not in again)
    for label, group in groups.items():
        if before[label] != _fingerprint(group):
            yield f"it changes {label}"


def _fingerprint(group: Group) -> list[tuple[object, ...]]:
    return [(sample.reward, sample.status, sample.response.tobytes(), sample.mask.tobytes()) for sample in group]


def _groups(subject: Subject[FilterSpec]) -> dict[str, Group]:
    mixed = make_group([0.0, 1.0, 0.5, 1.0])
    failed = replace(mixed[0], status="failed", reward=0.0, rewards={}, error="the reward raised")
    groups = {
        "different rewards": mixed,
        "equal rewards": make_group([1.0, 1.0, 1.0]),
        "a single sample": make_group([0.3]),
        "a failed sample": [failed, *mixed[1:]],
        "failed samples only": [failed, replace(failed, index=1)],
        "an aborted sample": [replace(mixed[0], status="aborted"), *mixed[1:]],
        "an empty response": [make_sample("", reward=0.0), make_sample("x", index=1, reward=1.0)],
    }
    given = list(subject.example.samples)
    return {**groups, **({"the example's samples": given} if given else {})}


RULES = (answers_true_or_false, keeps_what_it_kept)
