"""Tokenizers: loading one, and making a small one for a new model.

Importing transformers' tokenizers imports PyTorch where it is installed and takes seconds, so it happens on use;
making a tokenizer needs only the library `tokenizers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from miles_core.errors import UserError, nearest
from miles_core.roles import Tokenizer

PAD, EOS, UNKNOWN = "<|pad|>", "<|eos|>", "<|unknown|>"
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
_PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or hub name. Raises `UserError` if there is none."""
    folder = Path(model)
    if folder.is_dir():
        check_tokenizer(folder)
    try:
        return cast(Tokenizer, _class_for(folder).from_pretrained(str(model)))
    except Exception as error:  # of a broken file, transformers raises whatever it stumbles over
        raise UserError(f"the tokenizer of {model} cannot be loaded: {type(error).__name__}: {error}") from error


def check_tokenizer(folder: Path) -> None:
    """Raises `UserError` if a model folder has no tokenizer files. Imports nothing."""
    if not any((folder / name).is_file() for name in _FILES):
        raise UserError(
            f"{folder} has no tokenizer (none of {', '.join(_FILES)}): "
            "copy the tokenizer files of the model it was made from into it"
        )


def _class_for(folder: Path) -> Any:
    """`AutoTokenizer` brings the models along and takes four times as long to import, so a folder that says it is plain
    tokenizer.json is read as such."""
    config = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() and config.is_file():
        fields = json.loads(config.read_text("utf-8"))
        if fields.get("tokenizer_class") in _PLAIN_CLASSES and "auto_map" not in fields:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def numbered_tokens(folder: Path) -> dict[str, int] | None:
    """Each token's number, added tokens among them, as tokenizer.json says; None if there is no such file, or one of
    another kind. Imports nothing."""
    try:
        fields = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        vocabulary = fields["model"]["vocab"]
        added = {token["content"]: int(token["id"]) for token in fields.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(vocabulary, list):  # of a unigram model: [token, score] each
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return {**vocabulary, **added}


def tokenizer_mismatch(policy: Path, teacher: Path) -> str | None:
    """Why a teacher cannot read the tokens of a policy, in words; None if it can. Folders with tokenizers.

    Each of the policy's tokens must have the same number there. Imports transformers if a tokenizer has no
    tokenizer.json.
    """
    ours, theirs = (numbered_tokens(folder) or _vocabulary(folder) for folder in (policy, teacher))
    differing = [token for token, number in ours.items() if theirs.get(token) != number]
    if not differing:
        return None
    token = min(differing, key=ours.__getitem__)
    there = f"has number {theirs[token]}" if token in theirs else "is no token"
    return (
        f"the teacher {teacher} cannot read the policy's tokens: {len(differing)} of {len(ours)} differ, such as "
        f"{token!r}, which is number {ours[token]} in the policy's tokenizer and {there} in the teacher's; choose "
        "models that have the same tokenizer"
    )


def _vocabulary(folder: Path) -> dict[str, int]:
    """By transformers."""
    found: dict[str, int] = cast(Any, load_tokenizer(folder)).get_vocab()
    return found


def make_tokenizer(name: str, folder: Path) -> dict[str, int]:
    """Writes the tokenizer `name` into `folder`, so that `transformers.AutoTokenizer` loads it.

    "bytes": one token a byte, for any text; a token's id is its byte. "ascii": one token a printable ASCII character or
    newline, and one unknown token for any other byte; a smaller vocabulary makes a tiny model faster.
    Neither has a chat template.
    Returns the fields of config.json that follow from it: vocab_size, eos_token_id, pad_token_id.
    Raises `UserError` for an unknown name.
    """
    if name not in _BYTES:
        raise UserError(f"there is no tokenizer {name!r} to make for a new model. {nearest(name, _BYTES)}")
    made = _byte_level(_BYTES[name])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(made.to_str(pretty=True), "utf-8")  # `save` has no OSError for a full disk
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": made.model.unk_token,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return {
        "vocab_size": made.get_vocab_size(),
        "eos_token_id": made.token_to_id(EOS),
        "pad_token_id": made.token_to_id(PAD),
    }


_BYTES: Mapping[str, Sequence[int]] = {"bytes": range(256), "ascii": (0x0A, *range(0x20, 0x7F))}
"""The bytes that each tokenizer knows, in the order of their token ids."""


def _byte_level(known: Sequence[int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {_byte_name(byte): place for place, byte in enumerate(known)}
    unknown = UNKNOWN if len(known) < 256 else None
    if unknown is not None:
        vocab[unknown] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*([unknown] if unknown else []), PAD, EOS])
    return made


_PRINTABLE = frozenset({*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)})


def _byte_name(byte: int) -> str:
    """What byte-level tokenizers call a byte: a printable character is its own, the others are counted from U+0100."""
    return chr(byte if byte in _PRINTABLE else 256 + sum(other not in _PRINTABLE for other in range(byte)))
