"""Which engine has the beginning of a prompt in its cache.

Noted is who was sent what last. A prompt that continues an earlier one (the next turn of a conversation, another sample
of the same prompt) goes to the engine that has that. Only whole earlier prompts count, up to their last `BLOCK`: what
all prompts have in common, such as a system message, must not draw all of them to one engine.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from miles_core.sample import IntArray

BLOCK = 16
"""Tokens; shorter beginnings are not worth a detour."""
REMEMBERED = 65_536
"""Prompts, the latest; the caches hold far fewer."""
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Affinity:
    """Who was sent which prompts."""

    def __init__(self) -> None:
        self._sent: OrderedDict[tuple[int, int], int] = OrderedDict()

    def engine_of(self, tokens: IntArray) -> int | None:
        """Who was sent the longest prompt that `tokens` continue, None if nobody."""
        return next((self._sent[key] for key in reversed(_keys(tokens)) if key in self._sent), None)

    def note(self, tokens: IntArray, engine: int) -> None:
        """`engine` is sent the prompt."""
        for last in _keys(tokens)[-1:]:
            self._sent[last] = engine
            self._sent.move_to_end(last)
        if len(self._sent) > REMEMBERED:
            self._sent.popitem(last=False)

    def forget(self, engine: int) -> None:
        """That engine is gone, and its cache with it."""
        for key in [key for key, owner in self._sent.items() if owner == engine]:
            del self._sent[key]


def _keys(tokens: IntArray) -> list[tuple[int, int]]:
    """Length and hash of each beginning of whole blocks: a polynomial modulo 2^64, all of them at once."""
    count = len(tokens) // BLOCK * BLOCK
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(count, _BASE, np.uint64), dtype=np.uint64)
        sums = np.cumsum((tokens[:count].astype(np.uint64) + np.uint64(1)) * powers, dtype=np.uint64)
    return [(end, int(sums[end - 1])) for end in range(BLOCK, count + 1, BLOCK)]
