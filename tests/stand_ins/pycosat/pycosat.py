"""Stands in for pycosat where there is no C compiler: it can be imported, and says so when it is called."""

from __future__ import annotations

from typing import Any, NoReturn


def itersolve(*clauses: Any, **options: Any) -> NoReturn:
    """What reasoning-gym's task `zebra_puzzles` calls."""
    raise NotImplementedError("this task needs pycosat, and that a C compiler: install one, then pip install pycosat")


solve = itersolve
