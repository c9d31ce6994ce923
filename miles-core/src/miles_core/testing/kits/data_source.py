"""Rules of a data source: its prompts are drawn, and drawn again from where somebody stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from miles_core.roles import DataContext, DataSource
from miles_core.sample import Prompt
from miles_core.specs import DataSourceSpec
from miles_core.testing.fakes import ByteTokenizer
from miles_core.testing.subject import Subject

PROMPTS = 12
CONTEXT = DataContext(tokenizer=ByteTokenizer(), max_prompt_tokens=4096, seed=7)


def numbers_its_prompts(subject: Subject[DataSourceSpec]) -> Iterator[str]:
    """Ids count up from 0, without end, and every prompt has tokens of the vocabulary."""
    count = _count(_make(subject))
    prompts = _draw(_make(subject), count)
    if [prompt.id for prompt in prompts] != list(range(count)):
        yield f"the first ids are {[prompt.id for prompt in prompts[:5]]}; they must count up from 0"
    for prompt in prompts:
        if not len(prompt.tokens) or prompt.tokens.ndim != 1 or not np.issubdtype(prompt.tokens.dtype, np.integer):
            yield f"the tokens of prompt {prompt.id} are {prompt.tokens!r}"
        if subject.spec.answers and prompt.answer is None:
            yield f"prompt {prompt.id} has no answer, and its record says that there are answers"


def goes_on_where_it_stopped(subject: Subject[DataSourceSpec]) -> Iterator[str]:
    """After `seek(n)` come the same prompts as after n calls of `next`, in a new object too, also beyond an epoch."""
    source = _make(subject)
    count = _count(source)
    prompts = _draw(source, count)
    for place in (0, 1, count // 2, count - 1):
        for label, sought in (("the same source", source), ("a new source", _make(subject))):
            sought.seek(place)
            if not _same(_draw(sought, count - place), prompts[place:]):
                yield f"{label} gives other prompts after seek({place})"


def is_a_function_of_the_seed(subject: Subject[DataSourceSpec]) -> Iterator[str]:
    """The same seed gives the same prompts."""
    count = _count(_make(subject))
    if not _same(_draw(_make(subject), count), _draw(_make(subject), count)):
        yield "two sources with the same seed differ"


def keeps_to_the_limit(subject: Subject[DataSourceSpec]) -> Iterator[str]:
    """No prompt is longer than allowed: such are dropped, or refused by a `UserError`."""
    from miles_core.errors import UserError

    prompts = _draw(_make(subject), _count(_make(subject)))
    limit = (min(len(prompt.tokens) for prompt in prompts) + max(len(prompt.tokens) for prompt in prompts)) // 2
    try:
        source = subject.make(replace(CONTEXT, max_prompt_tokens=limit))
        longest = max(len(prompt.tokens) for prompt in _draw(source, _count(source)))
    except UserError:
        return
    if longest > limit:
        yield f"a prompt has {longest} tokens, and {limit} are allowed"


def repeats_after_an_epoch(subject: Subject[DataSourceSpec]) -> Iterator[str]:
    """`size` is the number of distinct prompts: an epoch of that many brings each once."""
    source = _make(subject)
    if source.size is None or source.size > 2000:
        return
    first, second = _draw(source, source.size), _draw(source, source.size)
    if sorted(prompt.text for prompt in first) != sorted(prompt.text for prompt in second):
        yield f"size is {source.size}, but the second {source.size} prompts are not the first ones again"


def keeps_evaluation_apart(subject: Subject[DataSourceSpec]) -> Iterator[str]:
    """No prompt of the split "eval" is one of the split "train"."""
    train, held = _make(subject), _make(subject, "eval")
    seen = {prompt.text for prompt in _draw(train, _count(train))}
    yield from (
        f"the prompt {prompt.text[:40]!r} is in both splits"
        for prompt in _draw(held, _count(held))
        if prompt.text in seen
    )


def _make(subject: Subject[DataSourceSpec], split: Literal["train", "eval"] = "train") -> DataSource:
    source: DataSource = subject.make(replace(CONTEXT, split=split))
    return source


def _count(source: DataSource) -> int:
    """Prompts to draw: more than an epoch where that is short."""
    return PROMPTS if source.size is None else min(2 * source.size + 1, PROMPTS)


def _draw(source: DataSource, count: int) -> list[Prompt]:
    return [source.next() for _ in range(count)]


def _same(left: list[Prompt], right: list[Prompt]) -> bool:
    return len(left) == len(right) and all(
        (one.id, one.text, one.answer) == (other.id, other.text, other.answer)
        and np.array_equal(one.tokens, other.tokens)
        for one, other in zip(left, right, strict=True)
    )


RULES = (
    numbers_its_prompts,
    goes_on_where_it_stopped,
    is_a_function_of_the_seed,
    keeps_to_the_limit,
    repeats_after_an_epoch,
    keeps_evaluation_apart,
)
