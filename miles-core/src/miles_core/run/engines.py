"""The run's engines: started with it, and again where one has failed.

A failed engine's requests wait in the pool, or others get them (`miles_core.cluster.engine_pool`); here another process
is started in its place. It has no weights yet: the trainer meets all engines anew and publishes to all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from miles_core.cluster.members import EngineMember
from miles_core.cluster.session import Call, Member, Session
from miles_core.config.schema import Plan
from miles_core.errors import RunError, UserError
from miles_core.roles import BucketLayout
from miles_core.run.turns import Turns


class RunEngines:
    """members: those that are left, one list for the whole run. say: tells the person at the terminal. taken_out:
    whether the collector has taken one out and not told why yet."""

    def __init__(self, plan: Plan, session: Session, model: Path, say: Callable[[str], None]) -> None:
        self.members: list[Member] = []
        self._plan, self._session, self._model, self._say = plan, session, model, say
        self._gone: set[int] = set()  # the numbers of those that are done without
        self._gpus: Sequence[str] = ()  # what each sees, where that is not Ray's to say
        self._failed_in: dict[str, int] = {}  # the step
        self._until_lost: dict[str, asyncio.Future[None]] = {}  # by name, done once it cannot go on
        self.taken_out = False

    def spawn(self) -> None:
        """A process for each."""
        count = self._plan.engine_section.count if self._plan.engine_section else 0
        self.members += [self._spawn(index) for index in range(count)]

    def _spawn(self, index: int) -> Member:
        engine = self._session.spawn(EngineMember, f"engine {index}", self._plan, index, self._model)
        self._until_lost[engine.name] = self._session.pending(engine, "until_lost")
        return engine

    @property
    def failed(self) -> bool:
        """Whether there is something to mend, as far as is known without asking."""
        return self.taken_out or any(self._until_lost[engine.name].done() for engine in self.members)

    async def share_gpus(self, trainers: Sequence[Member]) -> None:
        """Colocated engines see the GPUs that Ray gave to the trainer's ranks, and no others."""
        section = self._plan.engine_section
        if self._plan.placement.layout != "colocated" or section is None or not section.gpus:
            return
        visible = await self._session.ask_all(trainers, "visible")
        self._gpus = [",".join(visible[first : first + section.gpus]) for first in range(0, len(visible), section.gpus)]
        await asyncio.gather(*(self._see(engine) for engine in self.members))

    async def _see(self, engine: Member) -> None:
        if self._gpus:
            await self._session.ask(engine, "see", self._gpus[_number(engine)])

    def connections(self, address: str, layout: Sequence[BucketLayout]) -> list[Call]:
        """What brings them all to the trainer's meeting point."""
        asked = address, frozenset(self._gone), len(self.members), layout
        return [(engine, "connect_sync", asked) for engine in self.members]

    async def mend(self, collector: Member, step: int, turns: Turns) -> bool:
        """Starts engines again that have failed. Whether there were any: then the trainer has to meet all of them.

        One that does not start, or fails twice in a step, is done without, as long as another is left, and unless it is
        colocated: it has GPUs of the trainer then, which no other serves. Raises why it failed, if it cannot be.
        """
        self.taken_out = False
        dead, lost = await asyncio.gather(
            self._session.dead(self.members), self._session.ask(collector, "go_without", {})
        )
        if dead:
            lost |= await self._session.ask(collector, "go_without", dead)
        failed = [engine for engine in self.members if engine.name in lost]
        if not failed:
            return False
        await turns.make_room()
        await self._replace(failed, lost, collector, step)
        await turns.settle()
        return True

    async def _replace(
        self, failed: Sequence[Member], lost: Mapping[str, BaseException], collector: Member, step: int
    ) -> None:
        count = len(self.members)
        made = await asyncio.gather(*(self._again(engine, lost, step) for engine in failed))
        for engine, new in zip(failed, made, strict=True):
            if isinstance(new, Member):
                self.members[self.members.index(engine)] = new
            else:
                self.members.remove(engine)
                self._gone.add(_number(engine))
        if errors := [new for new in made if not isinstance(new, Member)]:
            if not self.members or self._plan.placement.layout == "colocated":
                raise errors[0]
            self._say("\n".join([*map(str, errors), f"going on with {len(self.members)} of {count} engines"]))
        back = [(new.name, new.actor, new.log) for new in made if isinstance(new, Member)]
        await self._session.ask(collector, "come_back", back)

    async def _again(self, engine: Member, lost: Mapping[str, BaseException], step: int) -> Member | BaseException:
        """Another in its place, or why there is none."""
        reason = lost[engine.name]
        self._session.leave(engine)
        if self._failed_in.get(engine.name) == step:
            return reason
        self._failed_in[engine.name] = step
        self._say(f"{reason}\nstarting {engine.name} again")
        new = self._spawn(_number(engine))
        try:
            await self._see(new)
            await self._session.ask(new, "enter")
            await self._session.ask(new, "start")
        except (UserError, RunError) as error:
            self._session.leave(new)
            return error
        return new


def _number(engine: Member) -> int:
    return int(engine.name.removeprefix("engine "))
