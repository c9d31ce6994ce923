"""Options of the engine `sglang`: `[engine]` of a run file.

Nothing of SGLang's is declared again here: the table holds fields of its `ServerArgs` by their own names, and
`miles_sglang.surface` checks them against the installed SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miles_sglang import surface


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The engine `sglang`.

    server: fields of SGLang's `ServerArgs`, by their own names; what Miles sets itself is refused.
    """

    server: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        surface.check(self.server)
