"""What contract tests try the recipe with."""

from __future__ import annotations

import json
from pathlib import Path

from miles_core.run.tokenizers import make_tokenizer
from miles_core.testing import Example


def with_teacher(folder: Path) -> Example:
    """A folder that looks like a teacher's, whose weights nobody reads."""
    fields = {"architectures": ["Qwen3ForCausalLM"], **make_tokenizer("ascii", folder)}
    (folder / "config.json").write_text(json.dumps(fields), "utf-8")
    (folder / "model.safetensors").write_bytes(bytes([2, *7 * [0]]) + b"{}")  # no tensors
    return Example(options={"teacher": {"path": str(folder)}})
