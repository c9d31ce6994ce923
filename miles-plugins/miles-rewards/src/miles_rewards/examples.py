"""How contract tests try this plugin's components."""

from __future__ import annotations

from pathlib import Path

from miles_core.roles import DataContext
from miles_core.testing import Example
from miles_core.testing.fakes import ByteTokenizer, make_sample
from miles_rewards import options

_TASK = "basic_arithmetic"


def length_penalty(folder: Path) -> Example:
    """A limit that some of the samples are beyond."""
    return Example(options={"max_tokens": 20, "cache": 10})


def gym_data(folder: Path) -> Example:
    """An easy task."""
    return Example(options={"task": _TASK})


def gym_reward(folder: Path) -> Example:
    """A right and a wrong response to a problem of that task."""
    from miles_rewards.gym import GymData

    context = DataContext(tokenizer=ByteTokenizer(), max_prompt_tokens=4096, seed=0)
    prompt = GymData(options.GymData(task=_TASK), context).next()
    texts = (prompt.answer or "", "no idea")
    return Example(
        samples=[
            make_sample(text, index=index, answer=prompt.answer, metadata=prompt.metadata)
            for index, text in enumerate(texts)
        ]
    )
