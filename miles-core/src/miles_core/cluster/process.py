"""What the long-lived processes of a run have in common: a log of their own, the run's plugins, errors that travel.

Constructors only take notes, because Ray loses the type of what a constructor raises; `enter` is the first call.

What a method raises leaves the process as a `UserError` or a `RunError` that carries the traceback as text: any other
exception may not survive the way, and Ray's account of it is longer than it is helpful.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from miles_core.config.schema import Plan
from miles_core.errors import RunError, UserError, explained
from miles_core.lifecycle import Role, lifecycle
from miles_core.plugins import disable, load_exact, resolve


def hooks_of(plan: Plan, role: Role) -> Any:
    """The lifecycle hooks of the run's callbacks in one process role."""
    chosen = [one for one in plan.callbacks if role in one.spec.runs_on]
    return lifecycle(role, [resolve(one.spec.ref)(one.options) for one in chosen])


def own_host(plan: Plan) -> str:
    """Where other members reach this one: loopback unless the cluster has several machines."""
    return "127.0.0.1" if plan.cluster.address is None else str(ray.util.get_node_ip_address())


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with its exceptions made to travel."""
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def awaited(self: MemberProcess, *args: Any) -> Any:
            try:
                return await method(self, *args)
            except Exception as error:
                raise self._failure(error, method.__name__) from None

        return awaited

    @functools.wraps(method)
    def called(self: MemberProcess, *args: Any) -> Any:
        # Shortly before others give up waiting for this call, the log gets to know where it stands.
        faulthandler.dump_traceback_later(0.9 * self.plan.cluster.deadline_s)
        try:
            return method(self, *args)
        except Exception as error:
            raise self._failure(error, method.__name__) from None
        finally:
            faulthandler.cancel_dump_traceback_later()

    return called


class MemberProcess:
    """What all members have. The public methods of its subclasses are guarded."""

    def __init__(self, name: str, log: Path, plan: Plan) -> None:
        self.name, self.log, self.plan = name, log, plan

    def __init_subclass__(cls) -> None:
        for name, item in list(vars(cls).items()):
            if inspect.isfunction(item) and not name.startswith("_"):
                setattr(cls, name, _guarded(item))

    def _failure(self, error: Exception, method: str) -> UserError | RunError:
        """What went wrong, as an error for people; the traceback goes into the log too."""
        with contextlib.suppress(OSError):  # the log may be on the full disk that is to be told of
            sys.stderr.write("".join(traceback.format_exception(error)))
            sys.stderr.flush()
        return explained(error, self.name, f"in {method} (log: {self.log})")

    def _enter(self) -> None:
        """The process's output goes to its log, its plugins are the driver's."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(descriptor, stream.fileno())
        faulthandler.enable()
        with contextlib.suppress(OSError):  # another machine may not have it
            os.chdir(self.plan.directory)
        disable(self.plan.values["plugins"]["disable"])  # trainers and engines look for a model's family among the rest
        load_exact(self.plan.plugin_set)
