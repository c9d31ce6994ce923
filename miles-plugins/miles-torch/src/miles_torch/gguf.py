"""A model of a GGUF file as a Hugging Face folder.

transformers reads the weights and gives them full precision. It leaves three things of the tokenizer as they are for
another model: which tokens end a text and fill it up, how a text is cut before it is merged, and how tokens become text
again. They are set here as the file says them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from miles_core.errors import UserError
from miles_core.extras import import_extra

_INSTALL = "miles-torch[gguf]"


def _smollm() -> Any:
    """Every digit by itself, then GPT-2's words."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


CUTS: Mapping[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": _smollm,
}
"""`tokenizer.ggml.pre` of a file -> how its tokenizer cuts a text."""


def convert(file: Path, folder: Path) -> None:
    """Writes `folder`, which appears when it is complete.

    Raises `UserError` for a file that is none of the kind and for a tokenizer that is not in `CUTS`, and
    `MissingExtraError` without the extra `gguf`.
    """
    for module in ("gguf", "accelerate"):  # transformers asks for the second, too
        import_extra(module, needed_by="import-gguf", install=_INSTALL)
    cut = CUTS[_cut_of(file)]()
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # of a family that it cannot read, transformers raises what it likes
        raise UserError(f"transformers cannot read {file}: {type(error).__name__}: {error}") from error
    _mend(tokenizer, cut, model.config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as part:
        made = Path(part, "model")
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)


def _mend(tokenizer: Any, cut: Any, config: Any) -> None:
    """The tokenizer as the file says it."""
    tokenizer.backend_tokenizer.pre_tokenizer = cut
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    for kind in ("bos", "eos", "pad"):
        number = getattr(config, f"{kind}_token_id")
        setattr(tokenizer, f"{kind}_token", None if number is None else tokenizer.convert_ids_to_tokens(number))


def _cut_of(file: Path) -> str:
    """How the file's tokenizer cuts a text, a key of `CUTS`. Raises `UserError`."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no GGUF file: {error}") from None
    field = reader.get_field("tokenizer.ggml.pre")
    name = str(field.contents()) if field is not None else "none"
    if name not in CUTS:
        raise UserError(
            f"{file}: its tokenizer cuts texts in the way {name!r}, and only {', '.join(sorted(CUTS))} are known here; "
            "take the model's Hugging Face folder instead"
        )
    return name
