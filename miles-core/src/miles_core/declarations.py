"""Declaration hooks: the records that a plugin's module yields, and what its module must not do.

pluggy passes over in silence what it does not know, so a module is looked through before it is registered.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any, TypeVar, get_args, get_type_hints

import pluggy

from miles_core import specs
from miles_core.errors import nearest
from miles_core.hooks import DeclarationHooks
from miles_core.lifecycle import LIFECYCLE, lifecycle_hooks, register
from miles_core.specs import Spec

S = TypeVar("S", bound=Spec)


class RefusedError(Exception):
    """A plugin breaks a rule; the message says which, and no traceback would say more."""


def declarations(module: ModuleType) -> Iterator[Spec]:
    """The records of one module, checked. It gets a manager to itself, so provenance needs no bookkeeping."""
    manager = _manager()
    _check_module(manager, module)
    register(manager, module)
    for hook, kind in declaration_kinds().items():
        caller = getattr(manager.hook, hook)
        if caller.get_hookimpls():
            yield from _records(hook, kind, caller())


def deprecations(module: ModuleType) -> list[str]:
    """What is deprecated of the declaration hooks that a module implements, in words."""
    return register(_manager(), module)


@cache
def core_names() -> frozenset[tuple[str, str]]:
    """(kind, name) of all that core itself has, commands among it: what says such a name means core's."""
    from miles_core import builtin
    from miles_core.cli.main import COMMANDS

    commands = {(specs.CommandSpec.kind, name) for name in COMMANDS}
    return frozenset(commands | {(record.kind, record.name) for record in declarations(builtin)})


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("miles")
    manager.add_hookspecs(DeclarationHooks)
    return manager


def _records(hook: str, kind: type[S], answers: list[Any]) -> Iterator[S]:
    """One hook's records. pluggy leaves out an answer that is None, so there are none or one."""
    if not answers or not isinstance(answers[0], Iterable):
        got = type(answers[0]).__name__ if answers else "None"
        raise RefusedError(f"{hook} returned {got}; it must yield {kind.__name__} records")
    seen: set[str] = set()
    for record in answers[0]:
        if not isinstance(record, kind):
            shown = getattr(record, "name", record)
            raise RefusedError(f"{hook} gave {type(record).__name__} {shown!r:.80}, which is no {kind.__name__}")
        if record.name in seen:
            raise RefusedError(f"{hook} gave the {kind.kind} {record.name!r} twice")
        seen.add(record.name)
        yield record


@cache
def declaration_kinds() -> dict[str, type[Spec]]:
    """Declaration hook -> the type of its records, in the order of `DeclarationHooks`."""
    kinds = {}
    for hook, function in vars(DeclarationHooks).items():
        if hook.startswith("miles_"):
            returns = get_type_hints(function, localns={"specs": specs})["return"]
            kinds[hook] = get_args(returns)[0]
    return kinds


def _roles_of(hook: str) -> list[str]:
    return [role for role in LIFECYCLE if hook in lifecycle_hooks(role)]


def _check_module(manager: pluggy.PluginManager, module: ModuleType) -> None:
    """Refuses what is no declaration: pluggy itself would pass over it in silence."""
    for name, item in list(vars(module).items()):
        own = inspect.isfunction(item) and item.__module__ == module.__name__
        decorated = manager.parse_hookimpl_opts(module, name)
        if not own and decorated is None:
            continue
        if roles := _roles_of(name):
            raise RefusedError(f"{name} is a hook for the callbacks of a {roles[0]}; a module cannot implement it")
        if name in declaration_kinds():
            _check_declaration(name, item, decorated)
        elif decorated is not None:
            raise RefusedError(f"{name} is not a hook of Miles. {nearest(name, declaration_kinds())}")


def _check_declaration(name: str, function: Any, decorated: Mapping[str, Any] | None) -> None:
    if decorated is None:
        raise RefusedError(f"{name} lacks its @hookimpl")
    if decorated.get("wrapper") or decorated.get("hookwrapper"):
        raise RefusedError(f"{name} is a wrapper; a declaration cannot wrap those of others")
    if inspect.signature(function).parameters:
        raise RefusedError(f"{name} takes arguments; it is called with none")
