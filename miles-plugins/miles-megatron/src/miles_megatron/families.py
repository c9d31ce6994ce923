"""A model's description for Megatron-core, from the installed family that covers its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from miles_core.config.model import family_of, without_family
from miles_core.errors import UserError
from miles_core.megatron import MegatronModel
from miles_core.plugins import discover

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
    raise UserError(f"config.json: {without_family(config, catalog, BACKEND)}")
