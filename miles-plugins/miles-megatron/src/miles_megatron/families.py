"""A model's description for Megatron-core, from the installed family that covers its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from miles_core.errors import UserError
from miles_core.megatron import MegatronModel
from miles_core.plugins import discover
from miles_core.specs import ModelSpec

BACKEND = "megatron"


def describe(config: Mapping[str, Any]) -> MegatronModel:
    """The description of the model of a config.json. Raises `UserError` if no family covers it, or refuses it."""
    names = set(config.get("architectures") or ())
    entries = [entry for entry in discover().all(ModelSpec) if BACKEND in entry.spec.backends]
    for entry in entries:
        if names & set(entry.spec.architectures):
            try:
                model: MegatronModel = resolve_name(entry.spec.backends[BACKEND])(config)
            except (KeyError, ValueError) as error:
                raise UserError(f"config.json: model family {entry.spec.name!r}: {error}") from error
            return model
    known = ", ".join(sorted({name for entry in entries for name in entry.spec.architectures}))
    raise UserError(
        f"config.json: no installed model family describes {', '.join(sorted(names)) or 'it'} for Megatron. "
        f"Described: {known or 'none'}. To write one: miles plugins new my-model --kind model"
    )
