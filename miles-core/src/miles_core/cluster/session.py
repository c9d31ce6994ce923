"""A run's Ray session: it starts or joins a cluster, reserves the resources, starts members, and waits for them.

Every wait has a deadline and, past it, says who is late and where that member's log is. A member's own exception
reaches the driver as it was raised, with the member's traceback, not as "the actor died".
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles_core.config.schema import ClusterSection
from miles_core.errors import RunError, UserError

LOG_TAIL = 25
"""Lines of a dead member's log that an error shows."""


@dataclass(frozen=True)
class Member:
    """A process of the run: its name for people, its Ray actor and its log."""

    name: str
    actor: Any
    log: Path


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one member needs of the cluster."""

    cpus: int
    gpus: int = 0

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray names it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


class Session:
    """Started by `start`, ended by `stop`; runs in the driver."""

    def __init__(self, section: ClusterSection, places: Mapping[str, Place], logs: Path) -> None:
        self.deadline_s = section.deadline_s
        self.local = section.address is None
        self._address = section.address
        self._places = dict(places)
        self._logs = logs
        self._group: PlacementGroup | None = None
        self.members: list[Member] = []

    def start(self) -> None:
        """Starts a cluster on this machine, or joins the one at the address, and reserves the resources.

        Raises `UserError` if the cluster cannot be reached or has less than the run needs.
        """
        self._connect()
        self._check_resources()
        self._group = placement_group([place.bundle for place in self._places.values()], strategy="PACK")
        if not self._group.wait(self.deadline_s):
            raise RunError(
                f"the cluster has not given the run its {self._needs()} within {self.deadline_s:g} s "
                "(cluster.deadline_s): other runs hold them"
            )

    def _connect(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a member without GPUs still sees the host's
        common = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        try:
            if self.local:
                cpus = max(os.cpu_count() or 1, sum(place.cpus for place in self._places.values()))
                ray.init(num_cpus=cpus, include_dashboard=False, **common)
            else:
                ray.init(address=self._address, **common)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"cluster.address = {self._address!r}: no Ray cluster answers there: {error}") from error

    def _check_resources(self) -> None:
        have = ray.cluster_resources()
        for kind, needed in (("CPU", "cpus"), ("GPU", "gpus")):
            wanted = sum(getattr(place, needed) for place in self._places.values())
            if wanted > have.get(kind, 0):
                raise UserError(
                    f"the run needs {self._needs()}, but the cluster has {int(have.get(kind, 0))} {kind}s; "
                    "lower engine.count, engine.gpus or trainer.gpus"
                )

    def _needs(self) -> str:
        cpus = sum(place.cpus for place in self._places.values())
        gpus = sum(place.gpus for place in self._places.values())
        return f"{cpus} CPUs" + (f" and {gpus} GPUs" if gpus else "")

    def spawn(self, cls: type, name: str, *args: Any) -> Member:
        """A member of class `cls`, built in a process of its own as `cls(log, *args)`."""
        place = self._places[name]
        log = self._logs / f"{name.replace(' ', '-')}.log"
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=list(self._places).index(name)
        )
        options = {"num_cpus": place.cpus, "num_gpus": place.gpus, "scheduling_strategy": strategy, "max_restarts": 0}
        member = Member(name, ray.remote(cls).options(**options).remote(log, *args), log)
        self.members.append(member)
        return member

    async def ask(self, member: Member, method: str, *args: Any, deadline_s: float | None = None) -> Any:
        """What one member answers."""
        return (await self.ask_all([member], method, *args, deadline_s=deadline_s))[0]

    async def ask_all(
        self, members: Sequence[Member], method: str, *args: Any, deadline_s: float | None = None
    ) -> list[Any]:
        """What all members answer, or the first failure."""
        return await self.gather([(member, method, args) for member in members], deadline_s=deadline_s)

    async def gather(
        self, calls: Sequence[tuple[Member, str, tuple[Any, ...]]], deadline_s: float | None = None
    ) -> list[Any]:
        """The answers to several calls made at once, or the first failure."""
        limit = deadline_s or self.deadline_s
        futures = [
            asyncio.wrap_future(getattr(member.actor, method).remote(*args).future()) for member, method, args in calls
        ]
        done, _ = await asyncio.wait(futures, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        for future, (member, method, _) in zip(futures, calls, strict=True):
            if future in done and (error := future.exception()) is not None:
                raise translated(error, member, method) from error
        late = [call for future, call in zip(futures, calls, strict=True) if future not in done]
        if late:
            names = "; ".join(f"{member.name} in {method} (log: {member.log})" for member, method, _ in late)
            raise RunError(f"late by more than {limit:g} s (cluster.deadline_s): {names}")
        return [future.result() for future in futures]

    def stop(self) -> None:
        """Ends all members and leaves the cluster; a local one ends with it. Never raises."""
        for member in self.members:
            ray.kill(member.actor)
        self.members.clear()
        if self._group is not None:
            remove_placement_group(self._group)
        ray.shutdown()


def put(value: Any) -> Any:
    """A reference to `value` in the object store."""
    return ray.put(value)


def translated(error: BaseException, member: Member, method: str) -> BaseException:
    """A member's failure as an error for people."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, (UserError, RunError)):
            return cause
        text = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
        return RunError(f"{member.name} failed in {method}: {text} (log: {member.log})", cause=error.traceback_str)
    if isinstance(error, (RayActorError, ActorDiedError)):
        return RunError(
            f"{member.name} died in {method}; the last lines of its log, {member.log}:\n{_tail(member.log)}"
        )
    return error


def _tail(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", errors="replace").splitlines()[-LOG_TAIL:]
    except OSError:
        lines = []
    return "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
