"""Taking turns on shared GPUs: who sleeps when, and when weights are published again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miles_core.cluster.session import Member
from miles_core.run.turns import Turns

TRAINER, ENGINE = Member("trainer 0", None, Path("log")), Member("engine 0", None, Path("log"))


class Asked:
    """A session that notes what is asked of whom."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    async def ask_all(self, members: Sequence[Member], method: str, *args: Any) -> None:
        self.notes += [" ".join([member.name, method, *args]) for member in members]

    async def publish(self) -> None:
        self.notes.append("publish")

    def taken(self) -> list[str]:
        """Since the last call."""
        notes, self.notes = self.notes, []
        return notes


def test_one_sleeps_while_the_other_works() -> None:
    async def run() -> None:
        session: Any = Asked()
        turns = Turns(session, sleeps=True)
        await turns.begin([TRAINER], [ENGINE])
        assert (session.taken(), turns.training) == (["engine 0 sleep"], True)
        await turns.train()
        assert session.taken() == []
        to_engines = ["engine 0 wake weights", "publish", "trainer 0 sleep", "engine 0 wake all"]
        await turns.generate(session.publish, new=True)
        assert (session.taken(), turns.training) == (to_engines, False)
        await turns.generate(session.publish)
        assert session.taken() == []
        await turns.train()
        assert session.taken() == ["engine 0 sleep", "trainer 0 wake"]
        await turns.generate(session.publish)  # the same weights: a sleeping engine has kept none
        assert session.taken() == to_engines

    asyncio.run(run())


def test_without_sleeping_there_is_only_publishing() -> None:
    async def run() -> None:
        session: Any = Asked()
        turns = Turns(session, sleeps=False)
        await turns.begin([TRAINER], [ENGINE])
        await turns.generate(session.publish, new=True)
        await turns.train()
        await turns.generate(session.publish)
        assert session.taken() == ["publish"]

    asyncio.run(run())
