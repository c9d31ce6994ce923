"""Options of the data sources that core offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class JsonlOptions:
    """`[data]` of the data source `jsonl`: one JSON object a line.

    path: a file, a pattern such as "data/*.jsonl", or a list of them. prompt_key: a text or a list of chat messages.
    answer_key: a text or a number; "" if there is none. metadata_keys: go along for rewards.
    chat: put texts through the tokenizer's chat template, as messages always are; system: a system message, which
    makes a text a chat; template: further variables of the template.
    shuffle: a new order every epoch. eval_path: where evaluation prompts are; or holdout: the fraction of the prompts,
    by content, that is kept from training for them.
    """

    path: str | tuple[str, ...]
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    metadata_keys: tuple[str, ...] = ()
    chat: bool = False
    system: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    shuffle: bool = True
    eval_path: str | tuple[str, ...] | None = None
    holdout: float = 0.0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty")
        if not self.prompt_key:
            raise ValueError("prompt_key is empty")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be in [0, 1), got {self.holdout}")
        if self.eval_path is not None and self.holdout:
            raise ValueError("eval_path and holdout both say where evaluation prompts come from; give one")
