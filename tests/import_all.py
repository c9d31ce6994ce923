"""Imports every module of the packages named on the command line: `nox -s package` runs it against bare wheels.

A module that needs a package of an extra may be missing it, and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from importlib.metadata import requires


def extras(package: str) -> set[str]:
    """The first words of what the package's distribution declares as extras: "megatron" of megatron-core."""
    declared = [text for text in requires(package.replace("_", "-")) or () if "extra ==" in text]
    return {match[0].lower() for text in declared if (match := re.match(r"[A-Za-z0-9]+", text))}


for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in extras(name):
                raise
