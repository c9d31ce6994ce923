"""How contract tests try what core offers."""

from __future__ import annotations

import json
from pathlib import Path

from miles_core.testing import Example


def jsonl(folder: Path) -> Example:
    """Five questions to train on and three others to evaluate with."""
    for name, first, last in (("train", 0, 5), ("eval", 5, 8)):
        rows = [
            {"prompt": f"What is {n} + {'1' * (n + 1)}?", "answer": n + int("1" * (n + 1))} for n in range(first, last)
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return Example(options={"path": str(folder / "train.jsonl"), "eval_path": str(folder / "eval.jsonl")})
