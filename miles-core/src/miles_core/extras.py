"""Packages that a plugin can do without until a component of it is used: its extras."""

from __future__ import annotations

import importlib
from typing import Any

from miles_core.errors import MissingExtraError


def import_extra(module: str, *, needed_by: str, install: str) -> Any:
    """Imports a module of a package that a plugin declares as an extra.

    needed_by: the component in words, "tracker wandb"; install: what pip is told, "miles-trackers[wandb]". Raises
    `MissingExtraError` if the package is not installed; an installed one that is broken raises what it raises.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(
            f"{needed_by} needs {package}, which is not installed: pip install '{install}'"
        ) from None
    return importlib.import_module(module)
