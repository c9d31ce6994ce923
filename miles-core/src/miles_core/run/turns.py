"""Whose turn it is on GPUs that trainer and engines share.

A step with `placement.layout = "colocated"` and `placement.sleep`: the engines generate while the trainer sleeps; then
they sleep and the trainer works; then their weights wake, the trainer's are loaded into them, the trainer sleeps, and
the rest of the engines wakes, which is the largest part: their cache. So no more than the trainer and one more copy of
the weights is ever there beside each other.

A sleeping engine keeps no weights, so they are loaded again at every change of turns, also for a checkpoint.

An engine can be started only while the trainer sleeps. So for one that failed in the trainer's turn, or while its
weights arrived, the trainer goes to sleep, and its turn goes on once the new engine sleeps too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from miles_core.cluster.session import Member, Session

Publish = Callable[[], Awaitable[None]]


class Turns:
    """sleeps: whether one sleeps while the other works; without it nobody ever sleeps. The trainer has the first turn,
    and may be started once `begin` has returned."""

    def __init__(self, session: Session, *, sleeps: bool) -> None:
        self._session, self._sleeps = session, sleeps
        self._trainers: Sequence[Member] = ()
        self._engines: Sequence[Member] = ()
        self._training = True
        self._awake = True  # the trainer

    @property
    def training(self) -> bool:
        """Whether the trainer may work as it is."""
        return self._training or not self._sleeps

    async def begin(self, trainers: Sequence[Member], engines: Sequence[Member]) -> None:
        """The engines have started, and sleep."""
        self._trainers, self._engines = trainers, engines
        if self._sleeps:
            await self._session.ask_all(engines, "sleep")

    async def train(self) -> None:
        """The trainer's turn from now on."""
        if self._sleeps and not self._training:
            await self._to_trainer()
        self._training = True

    async def _to_trainer(self) -> None:
        await self._session.ask_all(self._engines, "sleep")
        await self._session.ask_all(self._trainers, "wake")
        self._awake = True

    async def _sleep_trainer(self) -> None:
        await self._session.ask_all(self._trainers, "sleep")
        self._awake = False

    async def generate(self, publish: Publish, *, new: bool = False) -> None:
        """The engines' turn from now on, with the weights that `publish` sends; new: they have not had them yet."""
        changes = self._sleeps and self._training
        if changes:
            await self._session.ask_all(self._engines, "wake", "weights")
        if changes or new:
            await publish()
        if changes:
            await self._sleep_trainer()
            await self._session.ask_all(self._engines, "wake", "all")
        self._training = False

    async def make_room(self) -> None:
        """Engines can be started. What had begun of a change of turns is given up; `settle` comes next."""
        if self._sleeps and self._awake:
            await self._session.ask(self._trainers[0], "give_up_sync")
            await self._sleep_trainer()

    async def settle(self) -> None:
        """All engines have started: back to whose turn it is."""
        if self._sleeps and self._training:
            await self._to_trainer()
