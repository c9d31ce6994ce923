"""What rewards that compare with a reference answer share."""

from __future__ import annotations

from miles_core import Sample


def answer_of(sample: Sample) -> str:
    """The reference answer. Raises `ValueError` if the data gave none."""
    if sample.answer is None:
        raise ValueError(f"prompt {sample.group} has no reference answer; see the options of the data source")
    return sample.answer
