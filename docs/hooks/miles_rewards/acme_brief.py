"""A reward for being right in few words."""

from collections.abc import Iterable
from dataclasses import dataclass

from miles_core import RewardSpec, hookimpl


@hookimpl
def miles_rewards() -> Iterable[RewardSpec]:
    yield RewardSpec(
        name="brief",
        ref="acme_brief:Brief",
        options="acme_brief:BriefOptions",
        needs_answer=True,
        summary="1 for an answer among at most so many words, else 0",
    )


@dataclass(frozen=True, kw_only=True)
class BriefOptions:
    """words: the most words that a response may have."""

    words: int = 5

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words must be at least 1, got {self.words}")


class Brief:
    def __init__(self, options: BriefOptions) -> None:
        self.words = options.words

    def score(self, samples) -> list[float]:
        """One finite score a sample; the samples are those of one prompt."""
        return [float(self._is_right(sample.text.split(), sample.answer)) for sample in samples]

    def _is_right(self, words: list[str], answer: str | None) -> bool:
        return answer in words and len(words) <= self.words
