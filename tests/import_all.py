"""Imports every module of the packages named on the command line: `nox -s package` runs it against bare wheels."""

from __future__ import annotations

import importlib
import pkgutil
import sys

for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        importlib.import_module(module.name)
