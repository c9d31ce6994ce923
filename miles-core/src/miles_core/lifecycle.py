"""Lifecycle hooks: the manager that calls a run's callbacks in one process role.

A callback is an object built for one run. Its class is looked through before the run starts, because pluggy passes over
in silence what it does not know: a misspelt hook, an argument with a default, a coroutine.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pluggy

from miles_core.errors import UserError, nearest
from miles_core.hooks import DriverHooks, RolloutHooks, TrainerHooks

Role = Literal["driver", "trainer", "rollout"]

LIFECYCLE: Mapping[Role, type] = {"driver": DriverHooks, "trainer": TrainerHooks, "rollout": RolloutHooks}
"""The lifecycle hooks of each process role."""


def lifecycle_hooks(role: Role) -> dict[str, Any]:
    """Lifecycle hook -> its specification, for one role."""
    return {name: item for name, item in vars(LIFECYCLE[role]).items() if not name.startswith("_")}


class _Lifecycle(pluggy.PluginManager):
    """The manager of one role: every method that has the name of one of its hooks implements it, decorated or not."""

    def __init__(self, role: Role) -> None:
        super().__init__("miles")
        self.hooks = lifecycle_hooks(role)
        self.add_hookspecs(LIFECYCLE[role])

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        if name not in self.hooks:
            return None
        return super().parse_hookimpl_opts(plugin, name) or _PLAIN


_PLAIN: Mapping[str, Any] = {
    "wrapper": False,
    "hookwrapper": False,
    "optionalhook": False,
    "tryfirst": False,
    "trylast": False,
    "specname": None,
}


def register(manager: pluggy.PluginManager, plugin: object, name: str | None = None) -> list[str]:
    """Registers, and returns what is deprecated of what the plugin implements, in words: pluggy's warnings.

    They are caught because nobody sees them otherwise, or, under `python -W error`, nobody sees anything else.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager.register(plugin, name)
    return [str(warning.message) for warning in caught]


def deprecations(callback: type) -> list[str]:
    """What is deprecated of the lifecycle hooks that a callback implements, in words."""
    return [text for role in LIFECYCLE for text in register(_Lifecycle(role), callback)]


def lifecycle(role: Role, objects: Iterable[object]) -> Any:
    """The hooks of one process role, calling the given callbacks in the given order: `lifecycle(...).step_end(...)`.

    Methods need no decorator; `hookimpl` on one sets pluggy's options. Methods for other roles are passed over.
    UserError: a callback has no lifecycle hook at all, or one that could not be called.
    """
    manager = _Lifecycle(role)
    for item in reversed(list(objects)):  # pluggy calls what was registered last first
        check_callback(type(item))
        register(manager, item)
    return manager.hook


def call_order(role: Role, callbacks: Sequence[type]) -> dict[str, list[int]]:
    """Lifecycle hook -> the places in `callbacks` of those that hear it, in the order in which `lifecycle` calls them.

    That is the given order, unless a method asks pluggy to be called first or last.
    """
    manager = _Lifecycle(role)
    for place, callback in reversed(list(enumerate(callbacks))):
        check_callback(callback)
        register(manager, type(callback.__name__, (callback,), {}), str(place))  # its own class: it may be there twice
    heard = {hook: getattr(manager.hook, hook).get_hookimpls() for hook in manager.hooks}
    return {hook: [int(one.plugin_name) for one in reversed(found)] for hook, found in heard.items()}


def check_callback(callback: type) -> None:
    """UserError: no lifecycle hook at all, a decorated method that is none, or one that cannot be called."""
    known = {name: function for role in LIFECYCLE for name, function in lifecycle_hooks(role).items()}
    marked = pluggy.PluginManager("miles")
    methods = {name: inspect.getattr_static(callback, name) for name in dir(callback) if not name.startswith("__")}
    for name in methods:
        if name not in known and marked.parse_hookimpl_opts(callback, name) is not None:
            raise UserError(f"{_label(callback)}.{name} is not a lifecycle hook. {nearest(name, known)}")
    heard = [name for name in methods if name in known]
    if not heard:
        raise UserError(
            f"{_label(callback)} has no method that is a lifecycle hook. Its methods: "
            f"{', '.join(name for name in methods if not name.startswith('_')) or 'none'}. Hooks: {', '.join(known)}."
        )
    for name in heard:
        options = marked.parse_hookimpl_opts(callback, name) or _PLAIN
        _check_method(f"{_label(callback)}.{name}", methods[name], known[name], options)


def _label(callback: type) -> str:
    return f"{callback.__module__}:{callback.__qualname__}"


def _check_method(label: str, method: Any, spec: Any, options: Mapping[str, Any]) -> None:
    """pluggy passes arguments by position of their names: none that has a default, none after a star."""
    function = getattr(method, "__func__", method)
    if not inspect.isfunction(function):
        raise UserError(f"{label} must be a method, and is {type(function).__name__}")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"{label} is async; lifecycle hooks are called, not awaited")
    if inspect.isgeneratorfunction(function) and not (options["wrapper"] or options["hookwrapper"]):
        raise UserError(f"{label} yields, so its body would never run; only @hookimpl(wrapper=True) may")
    given = list(inspect.signature(spec).parameters)[1:]
    takes = list(inspect.signature(function).parameters.values())
    for parameter in takes[0 if isinstance(method, staticmethod) else 1 :]:
        if parameter.name not in given:
            raise UserError(f"{label} takes {parameter.name!r}; the hook gives {', '.join(given)}")
        if parameter.default is not parameter.empty or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise UserError(f"{label}: {parameter.name!r} must be a plain argument without a default")
