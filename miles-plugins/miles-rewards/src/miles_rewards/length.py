"""Reward `length-penalty`: DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).

With L written tokens:  0 if L <= max - cache;  (max - cache - L) / cache up to max;  -1 beyond.
"""

from __future__ import annotations

from collections.abc import Sequence

from miles_core import Sample
from miles_rewards import options


class LengthPenalty:
    """Between 0 and -1, by the tokens that the policy wrote; what tools put into the response does not count."""

    def __init__(self, settings: options.LengthPenalty) -> None:
        self.settings = settings

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One score a sample."""
        free, cache = self.settings.max_tokens - self.settings.cache, self.settings.cache
        return [min(0.0, max(-1.0, (free - int(sample.mask.sum())) / cache)) for sample in samples]
