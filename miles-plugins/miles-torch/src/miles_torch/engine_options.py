"""`[engine]` with `name = "torch"`: what may be set beside core's own keys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of the engine `torch`.

    max_batch: sequences that generate at once; each holds a cache of `model.max_tokens` tokens. More of them wait.
    """

    max_batch: int = 64

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"engine.max_batch must be at least 1, got {self.max_batch}")
