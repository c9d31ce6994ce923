"""A run's Ray session: it starts or joins a cluster, reserves the resources, starts members, and waits for them.

Every wait has a deadline and, past it, says who is late and where that member's log is. A member's own exception
reaches the driver as it was raised, with the member's traceback (`miles_core.cluster.process`), not as "the actor
died".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles_core.config.schema import ClusterSection
from miles_core.errors import RunError, UserError

LOG_TAIL = 25
"""Lines of a dead member's log that an error shows."""
GRACE_S = 3.0
"""How long a failure waits for the news that another member has died, which would be its cause."""
LATE = 0.9
"""Who has not answered after this fraction of the deadline, when others give up, is late."""
PING = "ping"
"""The method that only says whether a member lives."""
CLOSE_S = 5.0
"""How long members may take to end by themselves before they are killed."""


class MemberDiedError(RunError):
    """A member's process is gone."""


@dataclass(frozen=True)
class Member:
    """A process of the run: its name for people, its Ray actor and its log."""

    name: str
    actor: Any
    log: Path


Call = tuple[Member, str, tuple[Any, ...]]
"""A member, its method, and the arguments."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one member needs of the cluster. beside: members that say the same word are on one machine."""

    cpus: int
    gpus: int = 0
    beside: str | None = None


def bundles(places: Mapping[str, Place]) -> dict[str, dict[str, float]]:
    """What is reserved, as Ray names it, by what is beside each other, or by a member's own name."""
    found: dict[str, Counter[str]] = {}
    for name, place in places.items():
        found.setdefault(place.beside or name, Counter()).update({"CPU": place.cpus, "GPU": place.gpus})
    return {name: {kind: count for kind, count in needs.items() if count} for name, needs in found.items()}


@contextlib.contextmanager
def _daemons_apart() -> Iterator[None]:
    """Ray starts each of its daemons in a process group of its own: a signal to ours (`timeout`, batch systems) is for
    the run, which ends its members before them. They end with this process, however that ends."""
    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


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
        self._pending: set[asyncio.Future[Any]] = set()

    def start(self) -> None:
        """Starts a cluster on this machine, or joins the one at the address, and reserves the resources.

        Raises `UserError` if the cluster cannot be reached or has less than the run needs.
        """
        self._connect()
        self._check_resources()
        self._group = placement_group([*bundles(self._places).values()], strategy="PACK")
        if not self._group.wait(self.deadline_s):
            raise RunError(
                f"the cluster has not given the run its {self._needs()} within {self.deadline_s:g} s "
                "(cluster.deadline_s): other runs hold them"
            )

    def _connect(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a member without GPUs still sees the host's
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        os.environ.setdefault("RAY_worker_niceness", "0")  # members are no background work: Ray's default is 15
        logging.getLogger("ray").setLevel(logging.ERROR)
        common = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        terminated = signal.getsignal(signal.SIGTERM)
        try:
            if self.local:
                self._start_local(common)
            else:
                ray.init(address=self._address, **common)
        except SystemExit:  # Ray's answer to SIGTERM meanwhile
            raise KeyboardInterrupt from None
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"cluster.address = {self._address!r}: no Ray cluster lets us in there: {error} (for one that wants a "
                "token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
            ) from error
        finally:
            signal.signal(signal.SIGTERM, terminated)  # Ray's own would leave without ending the members
        # Ray prints what it has to say of a dead worker on standard output; we say it ourselves, with the log's end.
        ray._private.worker._worker_logs_enabled = False

    def _start_local(self, common: Mapping[str, Any]) -> None:
        """A cluster on this machine. Ray gives its daemons 30 s; a busy machine may need another try."""
        cpus = max(os.cpu_count() or 1, sum(place.cpus for place in self._places.values()))
        for last in (False, True):
            try:
                with _daemons_apart():
                    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **common)
                return
            except Exception as error:  # Ray has no class of its own for it
                ray.shutdown()
                if last:
                    raise RunError(f"Ray does not start on this machine: {error}") from error

    def _check_resources(self) -> None:
        have = ray.cluster_resources()
        for kind, needed in (("CPU", "cpus"), ("GPU", "gpus")):
            wanted = sum(getattr(place, needed) for place in self._places.values())
            if wanted > have.get(kind, 0):
                raise UserError(
                    f"the run needs {self._needs()}, but the cluster has {int(have.get(kind, 0))} {kind}s; "
                    "lower engine.count, engine.gpus or trainer.gpus"
                )
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for name, needs in bundles(self._places).items():
            if not any(all(machine.get(kind, 0) >= count for kind, count in needs.items()) for machine in machines):
                wanted = " and ".join(f"{count} {kind}s" for kind, count in needs.items())
                raise UserError(
                    f"{name} needs {wanted} of one machine, and none of the cluster's has as many; an engine runs on "
                    "one machine: lower engine.gpus"
                )

    def _needs(self) -> str:
        cpus = sum(place.cpus for place in self._places.values())
        gpus = sum(place.gpus for place in self._places.values())
        return f"{cpus} CPUs" + (f" and {gpus} GPUs" if gpus else "")

    def spawn(self, cls: type, name: str, *args: Any) -> Member:
        """A member of class `cls`, built in a process of its own as `cls(name, log, *args)`."""
        place = self._places[name]
        log = self._logs / f"{name.replace(' ', '-')}.log"
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group,
            placement_group_bundle_index=list(bundles(self._places)).index(place.beside or name),
        )
        options = {"num_cpus": place.cpus, "num_gpus": place.gpus, "scheduling_strategy": strategy, "max_restarts": 0}
        member = Member(name, ray.remote(cls).options(**options).remote(name, log, *args), log)
        self.members.append(member)
        return member

    def pending(self, member: Member, method: str) -> asyncio.Future[Any]:
        """What a member answers whenever it does; done too if the member dies. Nobody has to wait for it."""
        future = asyncio.wrap_future(getattr(member.actor, method).remote().future())
        future.add_done_callback(_heard)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    async def ask(self, member: Member, method: str, *args: Any, deadline_s: float | None = None) -> Any:
        """What one member answers."""
        return (await self.ask_all([member], method, *args, deadline_s=deadline_s))[0]

    async def ask_all(
        self, members: Sequence[Member], method: str, *args: Any, deadline_s: float | None = None
    ) -> list[Any]:
        """What all members answer, or the first failure."""
        return await self.gather([(member, method, args) for member in members], deadline_s=deadline_s)

    async def gather(self, calls: Sequence[Call], deadline_s: float | None = None) -> list[Any]:
        """The answers to several calls made at once, or the first failure. A member does its calls one after another,
        and has the time for each."""
        most = max(Counter(id(member) for member, _, _ in calls).values())
        limit = deadline_s or most * self.deadline_s
        futures = [
            asyncio.wrap_future(getattr(member.actor, method).remote(*args).future()) for member, method, args in calls
        ]
        for future in futures:
            future.add_done_callback(_heard)
        began = time.monotonic()
        done, pending = await asyncio.wait(futures, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        error, pending = await _failure(dict(zip(futures, calls, strict=True)), done, pending)
        late = [call for future, call in zip(futures, calls, strict=True) if future in pending]
        if late and time.monotonic() - began >= LATE * limit:
            raise _lateness(late, limit, error)
        if error is not None:
            raise error
        return [future.result() for future in futures]

    async def dead(self, members: Sequence[Member]) -> dict[str, BaseException]:
        """Those of the members whose process is gone, by name, with what there is to say of it."""
        futures = {asyncio.wrap_future(getattr(member.actor, PING).remote().future()): member for member in members}
        done, _ = await asyncio.wait(futures, timeout=self.deadline_s)
        errors = {futures[future].name: (future.exception(), futures[future]) for future in done}
        found = {name: translated(error, member, PING) for name, (error, member) in errors.items() if error}
        return {name: error for name, error in found.items() if isinstance(error, MemberDiedError)}

    def leave(self, member: Member) -> None:
        """Ends one member, which has failed."""
        ray.kill(member.actor)
        self.members.remove(member)

    async def stop(self) -> None:
        """Ends all members and leaves the cluster; a local one ends with it.

        Members are asked to end what they have started; those that do not answer within `CLOSE_S` are killed.
        """
        for future in list(self._pending):
            future.cancel()
        try:
            closing = [asyncio.wrap_future(member.actor.close.remote().future()) for member in self.members]
            for future in closing:
                future.add_done_callback(_heard)
            if closing:
                await asyncio.wait(closing, timeout=CLOSE_S)
        finally:
            self._kill()

    def _kill(self) -> None:
        for member in self.members:
            ray.kill(member.actor)
        self.members.clear()
        if self._group is not None:
            with contextlib.suppress(Exception):  # the cluster itself may be what failed
                remove_placement_group(self._group)
            self._group = None
        ray.shutdown()


async def _failure(
    calls: Mapping[asyncio.Future[Any], Call], done: set[asyncio.Future[Any]], pending: set[asyncio.Future[Any]]
) -> tuple[BaseException | None, set[asyncio.Future[Any]]]:
    """The failure to tell of the calls that are done, if there is one; and the calls that are pending.

    When a process dies, those that were connected to it fail too, and may be heard first; so a failure waits for a
    moment, and a death goes before all others.
    """
    failures = _failures(calls, done)
    until = time.monotonic() + GRACE_S
    while failures and pending and not any(isinstance(error, MemberDiedError) for error in failures):
        left = until - time.monotonic()
        done, pending = await asyncio.wait(pending, timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if not done:
            break
        failures += _failures(calls, done)
    deaths = [error for error in failures if isinstance(error, MemberDiedError)]
    return next(iter([*deaths, *failures]), None), pending


def _lateness(late: Sequence[Call], limit: float, error: BaseException | None) -> BaseException:
    """Who is late; and what others made of it, whose own limits may have ended a little earlier."""
    if isinstance(error, MemberDiedError | UserError):
        return error
    names = "; ".join(f"{member.name} in {method} (log: {member.log})" for member, method, _ in late)
    text = f"no answer within {limit:g} s (cluster.deadline_s): {names}"
    return RunError(f"{text}\nwhereupon {error}" if error is not None else text)


def _failures(calls: Mapping[asyncio.Future[Any], Call], done: set[asyncio.Future[Any]]) -> list[BaseException]:
    """What went wrong in the calls that are done, in the order of the calls."""
    failed = [(future.exception(), call) for future, call in calls.items() if future in done]
    return [translated(error, member, method) for error, (member, method, _) in failed if error is not None]


def _heard(future: asyncio.Future[Any]) -> None:
    """A failure that nobody waits for any more is no news."""
    if not future.cancelled():
        future.exception()


def translated(error: BaseException, member: Member, method: str) -> BaseException:
    """A member's failure as an error for people."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, (UserError, RunError)):
        return error.cause
    if isinstance(error, RayActorError) and not error.actor_init_failed:
        what = "" if method == PING else f" in {method}"
        return MemberDiedError(
            f"{member.name} died{what}; the last lines of its log, {member.log}:\n{_tail(member.log)}"
        )
    if isinstance(error, RayError):  # something of Ray's, before or after the member's own code
        return RunError(f"{member.name} failed in {method} (log: {member.log})", cause=str(error))
    return error


def _tail(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", errors="replace").splitlines()[-LOG_TAIL:]
    except OSError:
        lines = []
    return "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
