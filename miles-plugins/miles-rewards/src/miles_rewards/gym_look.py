"""A light look at a task of reasoning-gym, for plans: the library takes a second to import, so its sources are read.

It finds what there is not: a task, or a parameter of one. Which values parameters may have, the library says itself,
when a run makes its data. Where its sources are written in another way than this knows, there is nothing to say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from miles_core.errors import UserError, nearest
from miles_rewards import options

_TASK = re.compile(r'(?:DATASET_NAME\s*=|register_dataset\()\s*"(\w+)"')
_FIELD = re.compile(r"^    (\w+):", re.MULTILINE)
_INHERITED = re.compile(r"^class \w*Config\(", re.MULTILINE)


def check(settings: options.GymData) -> None:
    """What the record calls before a run starts. Raises `UserError` for a task or a parameter that there is not."""
    sources = _sources()
    if not sources:
        return
    check_task_name(settings.task, sources)
    text = sources[settings.task]
    if not _INHERITED.search(text):
        check_parameter_names(settings.task, settings.parameters, set(_FIELD.findall(text)))


@cache
def _sources() -> Mapping[str, str]:
    """Task -> the module that registers it."""
    spec = find_spec("reasoning_gym")
    if spec is None or spec.origin is None:
        return {}
    texts = (path.read_text("utf-8", errors="replace") for path in Path(spec.origin).parent.rglob("*.py"))
    return {task: text for text in texts for task in _TASK.findall(text)}


def check_task_name(task: str, known: Collection[str]) -> None:
    """Raises `UserError` with the nearest."""
    if task not in known:
        raise UserError(f"data.task: reasoning-gym has no task {task!r}. {nearest(task, known)}")


def check_parameter_names(task: str, parameters: Iterable[str], fields: set[str]) -> None:
    """fields: of the task's configuration, perhaps with others. Raises `UserError` with the nearest."""
    known = fields - {"seed", "size"}
    for name in parameters:
        if name in ("seed", "size"):
            raise UserError(
                f"data.parameters.{name} is not for you to set: seeds come from the run's, sizes from data.size"
            )
        if name not in known:
            raise UserError(f"data.parameters.{name}: {task!r} has no parameter {name!r}. {nearest(name, known)}")
