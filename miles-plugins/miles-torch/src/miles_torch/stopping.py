"""When a response is over: a stop token, or a stop string at its tail."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from miles_core.roles import Tokenizer


@dataclass(frozen=True)
class StopRule:
    """Ends a response at any of `token_ids`, or once its text holds one of `strings`."""

    token_ids: frozenset[int]
    strings: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    _completes: dict[int, bool] = field(default_factory=dict, repr=False, compare=False)

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the response ends with its newest token; asked after every token."""
        if tokens[-1] in self.token_ids:
            return True
        if not self.strings or not self._may_complete(tokens[-1]):
            return False
        text = self._text(tokens[-self._window :])
        return any(string in text for string in self.strings)

    def _may_complete(self, token: int) -> bool:
        """Whether a stop string can end with this token: its own text holds the last character of one, or a part of a
        character. (A string that ends with white space always can: tokenizers strip that from a token's own text.)"""
        if token not in self._completes:
            text = self._text([token])
            ends = {string[-1] for string in self.strings}
            self._completes[token] = any(end in text or end.isspace() for end in ends) or "\ufffd" in text
        return self._completes[token]

    def _text(self, tokens: Sequence[int]) -> str:
        assert self.tokenizer is not None, "stop strings are refused where there is no tokenizer"
        return self.tokenizer.decode(tokens)

    @cached_property
    def _window(self) -> int:
        """Newest tokens that are decoded to look for the strings: every token of a match adds at least one byte, and a
        few more keep the characters at the window's edge whole."""
        return max(len(string.encode()) for string in self.strings) + 4


def end_tokens(folder: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The model's own end tokens: what generation_config.json, config.json and the tokenizer name, together."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        found.update(named if isinstance(named, list) else [] if named is None else [named])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(found)
