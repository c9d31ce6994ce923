"""The reward `acme-suffix-reward`."""

from __future__ import annotations

from collections.abc import Sequence

from miles_core import Sample

from acme_suffix_reward import options


class AcmeSuffixReward:
    """1 for the answer at the end, less for the answer elsewhere. Runs in a worker process, which may be killed."""

    def __init__(self, settings: options.AcmeSuffixReward) -> None:
        self.settings = settings

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One finite score a sample; the samples are those of one prompt."""
        return [self._score(self._plain(sample.text), self._plain(sample.answer or "")) for sample in samples]

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.settings.ignore_case else text.strip()

    def _score(self, text: str, answer: str) -> float:
        if answer and text.endswith(answer):
            return 1.0
        return self.settings.inside if answer and answer in text else 0.0
