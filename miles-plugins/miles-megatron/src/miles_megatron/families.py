"""A model's description for Megatron-core, from the installed family that covers its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from miles_core.config.model import architectures, family_of
from miles_core.errors import UserError
from miles_core.megatron import MegatronModel
from miles_core.plugins import discover
from miles_core.specs import ModelSpec

BACKEND = "megatron"


def describe(config: Mapping[str, Any]) -> MegatronModel:
    """The description of the model of a config.json. Raises `UserError` if no family covers it, or refuses it."""
    catalog = discover()
    entry = family_of(config, catalog)
    if entry is not None and BACKEND in entry.spec.backends:
        try:
            model: MegatronModel = resolve_name(entry.spec.backends[BACKEND])(config)
        except (KeyError, ValueError) as error:
            raise UserError(f"config.json: model family {entry.spec.name!r}: {error}") from error
        return model
    names = architectures(config)
    entries = [entry for entry in catalog.all(ModelSpec) if BACKEND in entry.spec.backends]
    known = ", ".join(sorted({name for entry in entries for name in entry.spec.architectures}))
    raise UserError(
        f"config.json: no installed model family describes {', '.join(sorted(names)) or 'it'} for Megatron. "
        f"Described: {known or 'none'}. To write one: miles plugins new my-model --kind model"
    )
