"""The model folder of a run: an existing one, one of the Hugging Face hub, or a new one made from a family.

Every process reads config and tokenizer from that folder. Without weights in it the trainer makes them from the seed.
"""

from __future__ import annotations

import json
from pathlib import Path

from miles_core.config.schema import ModelSection, TeacherSection
from miles_core.errors import UserError
from miles_core.roles import ModelFamily
from miles_core.run.tokenizers import check_tokenizer, make_tokenizer, tokenizer_mismatch
from miles_core.run.weight_files import check_weights

MADE_BY = "miles_family"
"""The field of a new model's config.json that says which family the run file chose, for whoever reads it later: several
installed ones may cover its architecture."""


def prepare_model(section: ModelSection, family: ModelFamily | None, folder: Path) -> Path:
    """The Hugging Face folder of the model that `section` names: config and tokenizer, and weights if it has a `path`.

    A new model of `family` is written into `folder`, without weights. Runs in the driver; imports neither torch nor
    transformers. Raises `UserError` for a folder or hub name that is no model and for a config that the family refuses.
    """
    if section.path is not None:
        return _existing(section.path)
    assert family is not None, "a plan with model.family has resolved it"
    tokens = make_tokenizer(section.tokenizer, folder)
    try:
        config = family.fresh(
            {"bos_token_id": None, **tokens, "max_position_embeddings": section.max_tokens, **section.config}
        )
    except ValueError as error:
        raise UserError(f"[model.config] of family {section.family!r}: {error}") from error
    if config["vocab_size"] < tokens["vocab_size"]:
        raise UserError(
            f"model.config.vocab_size = {config['vocab_size']} is smaller than the {tokens['vocab_size']} tokens of "
            f"model.tokenizer = {section.tokenizer!r}; leave it out"
        )
    (folder / "config.json").write_text(json.dumps({**config, MADE_BY: section.family}, indent=2) + "\n", "utf-8")
    return folder


def prepare_teacher(section: TeacherSection, model: Path) -> Path:
    """The Hugging Face folder of the teacher, with weights, for the policy in the folder `model`.

    Runs in the driver; imports transformers only for a tokenizer without a tokenizer.json. Raises `UserError` for a
    folder or hub name that is no model, and for a teacher that cannot read the policy's tokens.
    """
    folder = _existing(section.path, "teacher.path")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"teacher.path = {section.path!r}: {folder} has no weights (*.safetensors)")
    if mismatch := tokenizer_mismatch(model, folder):
        raise UserError(f"teacher.path = {section.path!r}: {mismatch}")
    return folder


def vocabulary_size(model: Path) -> int | None:
    """How many tokens the model in a Hugging Face folder knows, padding among them, if its config.json says so."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def _existing(path: str, key: str = "model.path") -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _downloaded(path, key)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{key} = {path!r}: {folder} has no config.json, so it is no Hugging Face model")
    try:
        json.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{key} = {path!r}: {config} is not JSON: {error}") from error
    check_tokenizer(folder)
    check_weights(folder)
    return folder.resolve()


def _downloaded(name: str, key: str) -> Path:
    """The local snapshot of a hub model, downloaded if it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        snapshot = snapshot_download(
            name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]
        )
    except HFValidationError as error:
        raise UserError(f"{key} = {name!r} is neither an existing folder nor a name on the Hugging Face hub") from error
    except Exception as error:  # the hub's client raises its own, httpx's and the system's
        raise UserError(
            f"{key} = {name!r} is not an existing folder, and cannot be had from the Hugging Face hub: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    return Path(snapshot)
