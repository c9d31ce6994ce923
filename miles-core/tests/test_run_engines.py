"""Engines that have failed: which are started again, which are done without, and when the run cannot go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miles_core.cluster.members import EngineMember, TrainerMember
from miles_core.cluster.session import Member, MemberDiedError
from miles_core.errors import RunError, UserError
from miles_core.roles import Measures
from miles_core.run.engines import RunEngines
from miles_core.run.turns import Turns

COLLECTOR = Member("collector", None, Path("log"))


class Cluster:
    """A session in which the members named in `dead` are dead, and in `sick` do not start."""

    def __init__(self) -> None:
        self.dead_members: set[str] = set()
        self.sick: set[str] = set()
        self.notes: list[tuple[Any, ...]] = []
        self.left: list[Member] = []
        self.spawned = 0
        self.until_lost: dict[Any, Future[None]] = {}

    def spawn(self, cls: type, name: str, *args: Any) -> Member:
        self.spawned += 1
        return Member(name, f"process {self.spawned}", Path("log"))

    def pending(self, member: Member, method: str) -> Future[None]:
        assert method == "until_lost"
        return self.until_lost.setdefault(member.actor, Future())

    def leave(self, member: Member) -> None:
        self.left.append(member)

    async def dead(self, members: Sequence[Member]) -> Mapping[str, BaseException]:
        return {member.name: RunError(f"{member.name} died") for member in members if member.name in self.dead_members}

    async def ask(self, member: Member, method: str, *args: Any) -> Any:
        if method == "go_without":
            (dead,) = args
            self.dead_members -= dead.keys()
            return dead
        self.notes.append((member.name, method, *args))
        if method == "start" and member.name in self.sick:
            raise UserError(f"{member.name} does not start")
        return None

    async def ask_all(self, members: Sequence[Member], method: str) -> list[str]:
        return [str(place) for place, _ in enumerate(members)]


def engines_of(cluster: Any, count: int = 2, layout: str = "disaggregated", gpus: int = 0) -> tuple[RunEngines, Any]:
    """They, and what they say."""
    plan: Any = SimpleNamespace(
        engine_section=SimpleNamespace(count=count, gpus=gpus), placement=SimpleNamespace(layout=layout)
    )
    said: list[str] = []
    engines = RunEngines(plan, cluster, Path("model"), said.append)
    engines.spawn()
    return engines, said


def turns_of(cluster: Any) -> Turns:
    return Turns(cluster, sleeps=False)


def processes(engines: RunEngines) -> list[str]:
    return [f"{member.name}: {member.actor}" for member in engines.members]


def test_while_none_has_failed_nothing_happens() -> None:
    cluster = Cluster()
    engines, said = engines_of(cluster)
    members = engines.members
    assert asyncio.run(engines.mend(COLLECTOR, 1, turns_of(cluster))) is False
    assert (engines.members, said, cluster.left, cluster.notes) == (members, [], [], [])
    assert processes(engines) == ["engine 0: process 1", "engine 1: process 2"]


def test_one_that_has_failed_is_started_again_in_its_place_and_the_collector_hears_of_it() -> None:
    cluster = Cluster()
    engines, said = engines_of(cluster)
    members = engines.members
    cluster.dead_members = {"engine 0"}
    assert asyncio.run(engines.mend(COLLECTOR, 1, turns_of(cluster))) is True
    assert processes(engines) == ["engine 0: process 3", "engine 1: process 2"]
    assert engines.members is members
    assert [member.actor for member in cluster.left] == ["process 1"]
    assert said == ["engine 0 died\nstarting engine 0 again"]
    assert cluster.notes == [
        ("engine 0", "enter"),
        ("engine 0", "start"),
        ("collector", "come_back", [("engine 0", "process 3", Path("log"))]),
    ]
    assert engines.connections("tcp://here", []) == [
        (member, "connect_sync", ("tcp://here", frozenset(), 2, [])) for member in engines.members
    ]


def test_that_one_has_failed_is_known_without_asking_when_it_ends_or_the_collector_has_taken_it_out() -> None:
    cluster = Cluster()
    engines, _ = engines_of(cluster)
    known = [engines.failed]
    cluster.dead_members = {"engine 1"}
    cluster.until_lost["process 2"].set_result(None)
    known.append(engines.failed)
    assert asyncio.run(engines.mend(COLLECTOR, 1, turns_of(cluster))) is True
    known.append(engines.failed)  # the new one lasts
    engines.taken_out = True
    known.append(engines.failed)
    assert asyncio.run(engines.mend(COLLECTOR, 1, turns_of(cluster))) is False
    assert [*known, engines.failed] == [False, True, False, True, False]


def test_one_that_does_not_start_again_is_done_without() -> None:
    cluster = Cluster()
    engines, said = engines_of(cluster)
    cluster.dead_members, cluster.sick = {"engine 0"}, {"engine 0"}
    assert asyncio.run(engines.mend(COLLECTOR, 1, turns_of(cluster))) is True
    assert processes(engines) == ["engine 1: process 2"]
    assert [member.actor for member in cluster.left] == ["process 1", "process 3"]
    assert said[1] == "engine 0 does not start\ngoing on with 1 of 2 engines"
    ((_, _, asked),) = engines.connections("tcp://here", [])
    assert asked == ("tcp://here", frozenset({0}), 1, [])


def test_one_that_fails_twice_in_a_step_is_not_started_a_third_time() -> None:
    cluster = Cluster()
    engines, said = engines_of(cluster)
    for step, left in ((1, 2), (2, 2), (2, 1)):
        cluster.dead_members = {"engine 1"}
        assert asyncio.run(engines.mend(COLLECTOR, step, turns_of(cluster))) is True
        assert len(engines.members) == left
    assert cluster.spawned == 4
    assert said[-1] == "engine 1 died\ngoing on with 1 of 2 engines"


@pytest.mark.parametrize(("layout", "count"), [("disaggregated", 1), ("colocated", 2)])
def test_the_run_ends_with_the_reason_when_none_is_left_or_when_it_has_gpus_of_the_trainer(
    layout: str, count: int
) -> None:
    cluster = Cluster()
    engines, _ = engines_of(cluster, count, layout)
    cluster.dead_members, cluster.sick = {"engine 0"}, {"engine 0"}
    with pytest.raises(UserError, match="engine 0 does not start"):
        asyncio.run(engines.mend(COLLECTOR, 1, turns_of(cluster)))


def test_one_that_shares_gpus_with_the_trainer_sees_them_again() -> None:
    cluster = Cluster()
    engines, _ = engines_of(cluster, 2, "colocated", gpus=2)
    trainers = [Member(f"trainer {rank}", None, Path("log")) for rank in range(4)]
    asyncio.run(engines.share_gpus(trainers))
    assert cluster.notes == [("engine 0", "see", "0,1"), ("engine 1", "see", "2,3")]
    cluster.dead_members = {"engine 1"}
    asyncio.run(engines.mend(COLLECTOR, 1, turns_of(cluster)))
    assert cluster.notes[2:4] == [("engine 1", "see", "2,3"), ("engine 1", "enter")]


def test_one_that_takes_turns_is_started_while_the_trainer_sleeps_and_then_sleeps_itself() -> None:
    async def run() -> None:
        cluster = Turning()
        engines, _ = engines_of(cluster, 2, "colocated")
        session: Any = cluster
        turns = Turns(session, sleeps=True)
        await turns.begin([Member("trainer 0", None, Path("log"))], engines.members)
        for generating in (False, True):
            if generating:
                await turns.generate(nothing)
            cluster.notes.clear()
            cluster.dead_members = {"engine 1"}
            assert await engines.mend(COLLECTOR, 1 + generating, turns)
            done = [note[:2] for note in cluster.notes if note[0] != "collector"]
            start = [("engine 1", "enter"), ("engine 1", "start")]
            asleep = [("engine 0", "sleep"), ("engine 1", "sleep")]
            room = [("trainer 0", "give_up_sync"), ("trainer 0", "sleep")]
            assert done == (start if generating else [*room, *start, *asleep, ("trainer 0", "wake")])

    asyncio.run(run())


async def nothing() -> None: ...


class Turning(Cluster):
    """In which members note that they take turns."""

    async def ask_all(self, members: Sequence[Member], method: str, *args: Any) -> list[str]:
        self.notes += [(member.name, method, *args) for member in members]
        return ["" for _ in members]


def test_what_breaks_off_leaves_the_meeting_on_both_sides_and_the_engine_waits_for_whole_weights() -> None:
    """And the buckets are gone through, because other ranks of the trainer go through theirs."""
    done: list[Any] = []

    class End:
        """A sender and a receiver of which nothing comes."""

        def send(self, buckets: Iterator[int]) -> None:
            done.append(next(buckets))
            raise RunError("the transfer broke off")

        def receive(self, load: Any) -> None:
            raise RunError("the transfer broke off")

        def give_up(self) -> None: ...

        def close(self) -> None:
            done.append("closed")

    class Engine:
        load = None

        async def pause(self, mode: str) -> None:
            done.append(f"pause {mode}")

    plan: Any = SimpleNamespace(
        publish=SimpleNamespace(mode="drain"), cluster=SimpleNamespace(deadline_s=60.0), trainer=SimpleNamespace()
    )
    trainer = TrainerMember("trainer 0", Path("log"), plan, 0, ())
    trainer.sender, trainer.contexts = End(), {"policy": SimpleNamespace()}  # type: ignore[dict-item]

    def export() -> Iterator[int]:
        for number in range(3):
            done.append(number)
            yield number

    trainer.parts = {"policy": SimpleNamespace(export=export)}
    with pytest.raises(RunError, match="broke off"):
        trainer.publish(1)
    assert done == [0, 0, "closed", 1, 2]
    done.clear()

    async def run() -> None:
        engine = EngineMember("engine 0", Path("log"), plan, 0, Path("model"))
        engine.changing, engine.engine, engine.receiver = asyncio.Lock(), Engine(), End()
        with pytest.raises(RunError, match="broke off"):
            await engine.receive(1)

    asyncio.run(run())
    assert done == ["pause drain", "closed"]


def test_an_engine_may_measure_or_not() -> None:
    async def measure() -> Measures:
        return {"cached_tokens": 2.0}

    async def run() -> None:
        member = EngineMember("engine 0", Path("log"), SimpleNamespace(), 0, Path("model"))  # type: ignore[arg-type]
        member.engine = SimpleNamespace(busy_seconds=2.0)
        assert await member.measure() == {}
        member.engine.measure = measure
        assert await member.measure() == {"cached_tokens": 2.0}

    asyncio.run(run())


def test_an_engine_that_cannot_go_on_is_dead_for_whoever_asks_or_waits() -> None:
    async def run() -> None:
        plan: Any = SimpleNamespace()
        member = EngineMember("engine 0", Path("log"), plan, 0, Path("model"))
        member.news, member.loop = asyncio.Event(), asyncio.get_running_loop()
        member.engine = SimpleNamespace(busy_seconds=0.0)
        await member.ping()
        waiting = asyncio.create_task(member.take(60.0))
        await asyncio.sleep(0)
        await asyncio.to_thread(member._lose, "its server has ended")
        member._lose("something that followed")
        with pytest.raises(MemberDiedError, match="its server has ended"):
            await asyncio.wait_for(waiting, 10)
        for asked in (member.ping(), member.take(60.0)):
            with pytest.raises(MemberDiedError, match="its server has ended"):
                await asyncio.wait_for(asked, 10)

    asyncio.run(run())
