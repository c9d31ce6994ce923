"""What is known of a run's model before it is loaded: its config.json and its family."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from miles_core.config.schema import ModelSection
from miles_core.config.source import blame
from miles_core.errors import UserError
from miles_core.plugins import Catalog, Entry, resolve
from miles_core.roles import ModelFamily
from miles_core.run.model import MADE_BY, prepare_model
from miles_core.run.tokenizers import check_tokenizer
from miles_core.run.weight_files import check_weights
from miles_core.specs import ModelSpec


def load_family(entry: Entry[ModelSpec]) -> ModelFamily:
    """The family that a record names. Raises `PluginError` if its module does not import."""
    return cast("ModelFamily", resolve(entry.spec.ref)())


def read_config(model: ModelSection, origins: Mapping[str, str], catalog: Catalog) -> dict[str, Any] | None:
    """The complete config.json of the run's model; None for a hub model that this machine has not downloaded.

    Raises `UserError` for an unknown family, a field that its config.json has not, and an unusable model folder.
    """
    if model.family is not None:
        return _fresh_config(model, model.family, origins, catalog)
    assert model.path is not None
    return folder_config(model.path, "model.path", origins["model.path"])


def folder_config(path: str, key: str, where: str) -> dict[str, Any] | None:
    """The config.json of a model folder or hub name, which the run file says as `key` at `where`; None for a hub model
    that this machine has not downloaded. Raises `UserError`."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _folder_config(folder, where)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise UserError(f"{where}: {key} {path!r} is no folder, and no hub name such as Qwen/Qwen3-0.6B")
    cached = _cached_config(path)
    return None if cached is None else _read_json(cached, where)


def find_family(
    model: ModelSection, config: Mapping[str, Any] | None, origins: Mapping[str, str], catalog: Catalog
) -> Entry[ModelSpec] | None:
    """The installed family of the run's model, None if no plugin covers it. Raises `UserError` if several do, and for a
    chosen one that does not cover what it has made of [model.config]."""
    if model.family is not None:
        entry = catalog.get(ModelSpec, model.family)
        if not entry.spec.covers(config or {}):
            raise UserError(
                f"{origins['model.family']}: model family {entry.spec.name!r} covers "
                f"{', '.join(entry.spec.model_types or entry.spec.architectures)}, and its new model is "
                f"{architectures(config or {})}; no process of the run would know it by its config.json"
            )
        return entry
    try:
        return family_of(config or {}, catalog)
    except UserError as error:
        raise error.placed(origins["model.path"]) from None


def family_of(config: Mapping[str, Any], catalog: Catalog) -> Entry[ModelSpec] | None:
    """The installed family of the model of a config.json: of those that cover it the one that it was made by, or else
    one that asks for its model type; None if no plugin covers it. Raises `UserError` if several do."""
    found = [entry for entry in catalog.all(ModelSpec) if entry.spec.covers(config)]
    made_by = [entry for entry in found if config.get(MADE_BY) in (entry.spec.name, _full_name(entry))]
    found = made_by or [entry for entry in found if entry.spec.model_types] or found
    if len(found) > 1:
        names = " and ".join(map(_full_name, found))
        raise UserError(
            f"{len(found)} installed model families cover {architectures(config)}: {names}. Keep one and disable the "
            f'others\' plugins, as in plugins.disable = ["{found[-1].plugin.name}"]'
        )
    return found[0] if found else None


def _full_name(entry: Entry[ModelSpec]) -> str:
    return f"{entry.plugin.name}:{entry.spec.name}"


def architectures(config: Mapping[str, Any]) -> str:
    """The architectures that a config.json names, in words."""
    return ", ".join(sorted(config.get("architectures") or [])) or "a config.json without architectures"


def without_family(config: Mapping[str, Any], catalog: Catalog, backend: str | None = None) -> str:
    """What to say of a model that no installed family covers: which models they do cover, those that are described for
    a training framework if `backend` says one, and how to write another."""
    kind = f" (model_type {config['model_type']!r})" if "model_type" in config else ""
    specs = [entry.spec for entry in catalog.all(ModelSpec) if backend is None or backend in entry.spec.backends]
    known = ", ".join(f"{spec.name} ({', '.join(spec.model_types or spec.architectures)})" for spec in specs)
    described = f" and described for {backend!r}" if backend else ""
    message = (
        f"no installed model family covers {architectures(config)}{kind}. Installed{described}: {known or 'none'}. "
        "To write one: docs/how-to/write-a-model-family.md"
    )
    return "\n".join([message, *catalog.not_loaded()])


def _fresh_config(model: ModelSection, name: str, origins: Mapping[str, str], catalog: Catalog) -> dict[str, Any]:
    """The config.json that the run would write, so made in the same way."""
    try:
        family = load_family(catalog.get(ModelSpec, name))
    except UserError as error:
        raise error.placed(origins["model.family"]) from error.__cause__
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepare_model(model, family, Path(folder))
            return _read_json(Path(folder, "config.json"), origins["model.family"])
    except UserError as error:
        raise UserError(f"{_blame(str(error), origins)}: {error}") from None
    except OSError as error:
        raise UserError(
            f"no temporary file can be written: {error.strerror}; set TMPDIR to where there is room"
        ) from error


def _blame(message: str, origins: Mapping[str, str]) -> str:
    """The origin of the value of [model] that a message names, its config before the rest, or else of the family."""
    given = {name: origin for name, origin in origins.items() if origin != "default"}
    config = {name.removeprefix("model.config."): origin for name, origin in given.items() if "model.config." in name}
    own = {name.removeprefix("model."): origin for name, origin in given.items() if name.startswith("model.")}
    return blame(message, config) or blame(message, own) or origins["model.family"]


def _folder_config(folder: Path, where: str) -> dict[str, Any]:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{where}: model folder {folder} has no config.json, so it is no Hugging Face model")
    try:
        check_tokenizer(folder)
        check_weights(folder)
    except UserError as error:
        raise UserError(f"{where}: model folder {error}") from None
    return _read_json(config, where)


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{where}: {path} must hold a JSON object")
    return config


def _cached_config(name: str) -> Path | None:
    """The config.json of a hub model, if this machine has it; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None
