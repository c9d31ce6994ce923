"""Imported once by the fork server of the reward workers, so that each of them is forked with its modules loaded.

A reward's module may take seconds to import, and a worker that was killed past its time limit must be back in no time.
"""

import contextlib
import importlib
import os

import miles_core.run.scoring_worker  # noqa: F401

VARIABLE = "MILES_REWARD_MODULES"
"""Names of the modules to load, separated by spaces; set only while the fork server starts."""

for _name in os.environ.pop(VARIABLE, "").split():
    with contextlib.suppress(Exception):  # the worker meets the same error and reports it
        importlib.import_module(_name)
