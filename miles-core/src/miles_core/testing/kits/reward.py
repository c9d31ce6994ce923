"""Rules of a reward: it scores made-up samples, or those of its example."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from miles_core.sample import Sample
from miles_core.specs import RewardSpec
from miles_core.testing.fakes import make_sample
from miles_core.testing.subject import Subject

TEXTS = ("42", "The answer is \\boxed{42}.", "41", "No idea.", " ", "\\boxed{", "1/0", "ж€🙂\x00", "9" * 400)
"""Responses that a policy writes sooner or later."""


def gives_one_finite_score_for_each_sample(subject: Subject[RewardSpec]) -> Iterator[str]:
    """Scores are finite numbers, as many as there are samples, for groups of any size and whatever was written."""
    samples = _samples(subject)
    for group in (samples[:1], samples[:3], samples):
        yield from _faults(subject, group)


def scores_an_empty_response(subject: Subject[RewardSpec]) -> Iterator[str]:
    """A sample without a token, and one whose text is empty, has a finite score."""
    sample = _samples(subject)[0]
    nothing = replace(
        sample,
        text="",
        response=sample.response[:0],
        mask=sample.mask[:0],
        logprobs=sample.logprobs[:0],
        versions=sample.versions[:0],
    )
    yield from _faults(subject, [nothing, replace(sample, text="")])


def gives_the_same_score_again(subject: Subject[RewardSpec]) -> Iterator[str]:
    """If it says that it is deterministic, scores depend on the samples alone: not on call, order or object."""
    if not subject.spec.deterministic:
        return
    samples = _samples(subject)
    reward = subject.make()
    expected = [float(score) for score in reward.score(samples)]
    again = {
        "a second call": reward.score(samples),
        "another object": subject.make().score(samples),
        "another order": list(reversed(reward.score(samples[::-1]))),
    }
    if subject.spec.scope == "sample":
        again["scoring each sample by itself"] = [reward.score([sample])[0] for sample in samples]
    for label, scores in again.items():
        if not np.array_equal(expected, scores):
            yield f"{label} gives {_shown(scores)} and not {_shown(expected)}"


def changes_no_sample(subject: Subject[RewardSpec]) -> Iterator[str]:
    """Samples are as they were after they have been scored."""
    samples = _samples(subject)
    before = [(sample.response.copy(), sample.mask.copy(), dict(sample.metadata)) for sample in samples]
    subject.make().score(samples)
    for sample, (response, mask, metadata) in zip(samples, before, strict=True):
        same = np.array_equal(sample.response, response) and np.array_equal(sample.mask, mask)
        if not same or dict(sample.metadata) != metadata:
            yield f"it changes the sample {sample.text!r}"


def _samples(subject: Subject[RewardSpec]) -> list[Sample]:
    """The example's, each with the texts of others too, or made-up ones."""
    given = subject.example.samples
    if given:
        others = [replace(given[0], index=len(given) + place, text=text) for place, text in enumerate(TEXTS)]
        return [*given, *others]
    answer = "42" if subject.spec.needs_answer else None
    return [make_sample(text, index=index, answer=answer) for index, text in enumerate(TEXTS)]


def _faults(subject: Subject[RewardSpec], samples: Sequence[Sample]) -> Iterator[str]:
    scores = list(subject.make().score(samples))
    if len(scores) != len(samples):
        yield f"it gives {len(scores)} scores for {len(samples)} samples"
        return
    for sample, score in zip(samples, scores, strict=True):
        if not isinstance(score, (int, float, np.floating)) or not math.isfinite(score):
            yield f"the score of {sample.text[:40]!r} is {score!r}"


def _shown(scores: Sequence[float]) -> str:
    return ", ".join(f"{score:g}" for score in scores)


RULES = (
    gives_one_finite_score_for_each_sample,
    scores_an_empty_response,
    gives_the_same_score_again,
    changes_no_sample,
)
