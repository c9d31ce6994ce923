"""Rules of a rollout: it runs on an engine that makes tokens up and remembers each one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np

from miles_core.sample import Group, Sample
from miles_core.specs import RolloutSpec
from miles_core.testing.fakes import FakeRolloutContext, make_prompt
from miles_core.testing.subject import Subject, skip

SEEDS = (11, 12, 13)


def gives_one_unscored_sample_for_each_seed(subject: Subject[RolloutSpec]) -> Iterator[str]:
    """As many samples as seeds, in order, of the prompt's group, without rewards."""
    prompt = make_prompt()
    for seeds in (SEEDS, SEEDS[:1]):
        samples = _run(subject, FakeRolloutContext(), seeds)
        if [sample.index for sample in samples] != list(range(len(seeds))):
            yield f"for {len(seeds)} seeds it gives samples numbered {[sample.index for sample in samples]}"
        for sample in samples:
            if sample.group != prompt.id:
                yield f"sample {sample.index} is of group {sample.group}, and the prompt's id is {prompt.id}"
            if sample.reward is not None or sample.rewards:
                yield f"sample {sample.index} has a reward already"


def aligns_tokens_masks_and_logprobs(subject: Subject[RolloutSpec]) -> Iterator[str]:
    """A trained token is one that the engine made, with its log-probability and version; the prompt stands before."""
    for status in ("completed", "truncated"):
        context = FakeRolloutContext(status)
        for sample in _run(subject, context):
            yield from (f"sample {sample.index}: {fault}" for fault in _alignment_faults(subject, sample, context))


def _alignment_faults(subject: Subject[RolloutSpec], sample: Sample, context: FakeRolloutContext) -> Iterator[str]:
    start = make_prompt().tokens
    if not np.array_equal(sample.prompt[: len(start)], start):
        yield "it does not begin with the prompt's tokens"
    if len(sample.prompt) + len(sample.response) > context.max_tokens:
        yield f"it has {len(sample.prompt) + len(sample.response)} tokens, and {context.max_tokens} are allowed"
    for place, (token, logprob, version) in enumerate(
        zip(sample.response.tolist(), sample.logprobs.tolist(), sample.versions.tolist(), strict=True)
    ):
        if version < 0 and logprob:
            yield f"token {place} was not generated and has the log-probability {logprob:g}"
        elif version >= 0 and context.given.get(logprob) != (token, version):
            yield f"token {place} ({token}) has a log-probability or version that the engine did not give it"
        elif version < 0 and sample.mask[place] and subject.spec.engine:
            yield f"token {place} was not generated and is trained"


def says_what_became_of_it(subject: Subject[RolloutSpec]) -> Iterator[str]:
    """A sample of an aborted completion is aborted, and nothing more is generated for it."""
    if not subject.spec.engine:
        skip("it generates nothing")
    context = FakeRolloutContext("aborted")
    for sample in _run(subject, context):
        if sample.status != "aborted":
            yield f"sample {sample.index} has status {sample.status!r}"
    if context.completions > len(SEEDS):
        yield f"it asks for {context.completions} completions for {len(SEEDS)} samples whose first was aborted"


def gives_the_same_again(subject: Subject[RolloutSpec]) -> Iterator[str]:
    """The same seeds give the same samples."""
    first, second = (_run(subject, FakeRolloutContext()) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        if not np.array_equal(one.response, other.response) or not np.array_equal(one.mask, other.mask):
            yield f"sample {one.index} is another one when the same seeds come again"


def marks_baselines(subject: Subject[RolloutSpec]) -> Iterator[str]:
    """If it says that one sample is a baseline, exactly one is, and untrained; otherwise there is none."""
    for sample in (samples := _run(subject, FakeRolloutContext())):
        if sample.baseline and sample.mask.any():
            yield f"sample {sample.index} is a baseline and trained"
    count = sum(sample.baseline for sample in samples)
    if count != int(subject.spec.baseline):
        yield f"{count} samples are baselines, and its record says {int(subject.spec.baseline)}"


def _run(subject: Subject[RolloutSpec], context: FakeRolloutContext, seeds: tuple[int, ...] = SEEDS) -> Group:
    group: Group = asyncio.run(subject.make().run(make_prompt(), list(seeds), context))
    return group


RULES = (
    gives_one_unscored_sample_for_each_seed,
    aligns_tokens_masks_and_logprobs,
    says_what_became_of_it,
    gives_the_same_again,
    marks_baselines,
)
