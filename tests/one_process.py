"""A whole run in this process: the real plan, loop, collector, trainer and engine, without Ray.

Members are objects here and not actors elsewhere: what the driver asks of them is called on the event loop or on a
thread, weights go from hand to hand, and rewards are called where they are. What Ray adds is tested by whole runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from miles_core.cli.main import main
from miles_core.cluster import members
from miles_core.cluster.process import MemberProcess
from miles_core.cluster.session import Member
from miles_core.config.model import load_family
from miles_core.config.schema import Component, Plan, RewardSection
from miles_core.plugins import Catalog, discover, resolve
from miles_core.roles import Bucket
from miles_core.run import checkpoint, collector, driver
from miles_core.run.folder import load_plan, write_run_files
from miles_core.run.model import prepare_model
from miles_core.run.plan import make_plan
from miles_core.run.trackers import forget_after, read_metrics
from miles_core.sample import Group, Sample
from miles_core.specs import ModelSpec, RewardSpec, Spec, WeightSyncSpec


def train(
    target: str, flags: Sequence[str], catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> list[Mapping[str, Any]]:
    """`miles train TARGET FLAGS`, to its end; the metrics of its steps."""
    plan = make_plan(target, flags, catalog)
    family = load_family(catalog.get(ModelSpec, plan.model.family)) if plan.model.family else None
    write_run_files(plan, plan.folder)
    model = prepare_model(plan.model, family, plan.folder / "model")
    return _drive(plan, model, None, monkeypatch)


def resume(folder: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """`miles resume FOLDER`; the metrics of all steps."""
    plan, last = load_plan(folder, catalog), checkpoint.all_of(folder)[-1]
    forget_after(folder, last.step)
    return _drive(plan, folder / "model", last, monkeypatch)


def command(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """`miles ARGS` with all that it prints; the exit code."""

    async def drive(plan: Plan, *others: Any) -> None:
        await driven(_prepared(plan, monkeypatch), *others)

    driven = driver.drive
    with monkeypatch.context() as patch:
        patch.setattr(driver, "drive", drive)
        return main(args)


def _drive(
    plan: Plan, model: Path, resumed: checkpoint.Checkpoint | None, monkeypatch: pytest.MonkeyPatch
) -> list[Mapping[str, Any]]:
    plan = _prepared(plan, monkeypatch)
    asyncio.run(driver.drive(plan, model, resumed, _Silence()))  # type: ignore[arg-type]
    return [metrics for _, metrics in read_metrics(plan.folder) if "stage" in metrics]


def _prepared(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan as it can be driven here."""
    for component in filter(None, (plan.trainer, plan.engine)):
        resolve(component.spec.ref)  # two threads that import transformers at once trip over each other
    monkeypatch.setattr(driver, "Session", _Session)
    monkeypatch.setattr(collector, "Scorer", _Scorer)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(MemberProcess, "_enter", lambda self: None)
    monkeypatch.setattr(members, "watching", lambda engines, give_up: contextlib.nullcontext())
    return plan if plan.sync is None else replace(plan, sync=Component(spec=_SYNC, plugin="test"))


class _Actor:
    """A member as Ray's handle would show it: `actor.method.remote(*args)` is awaited."""

    def __init__(self, member: Any, starting: asyncio.Lock) -> None:
        self._member, self._starting, self._turn = member, starting, asyncio.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._member, name)

        async def called(*args: Any) -> Any:
            if inspect.iscoroutinefunction(method):
                return await method(*args)
            async with self._turn:  # a member does one thing after another, in the order of the calls
                return await asyncio.to_thread(method, *args)

        async def remote(*args: Any) -> Any:
            if name != "start":
                return await called(*args)
            async with self._starting:  # models that are made at once would share torch's random numbers
                return await called(*args)

        return SimpleNamespace(remote=remote)


class _Session:
    """`miles_core.cluster.session.Session`, as far as the driver needs it."""

    def __init__(self, section: Any, places: Any, logs: Path) -> None:
        self.deadline_s = section.deadline_s
        self.members: list[Member] = []
        self._logs = logs
        self._starting = asyncio.Lock()

    def start(self) -> None:
        """There is nothing to start."""

    def spawn(self, cls: Callable[..., Any], name: str, *args: Any) -> Member:
        log = self._logs / f"{name}.log"
        self.members.append(Member(name, _Actor(cls(name, log, *args), self._starting), log))
        return self.members[-1]

    def pending(self, member: Member, method: str) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    async def ask(self, member: Member, method: str, *args: Any, deadline_s: float | None = None) -> Any:
        return await getattr(member.actor, method).remote(*args)

    async def ask_all(self, asked: Sequence[Member], method: str, *args: Any, deadline_s: float | None = None) -> Any:
        return await self.gather([(member, method, args) for member in asked])

    async def gather(self, calls: Sequence[Any], deadline_s: float | None = None) -> list[Any]:
        return list(await asyncio.gather(*(self.ask(member, method, *args) for member, method, args in calls)))

    async def dead(self, members: Sequence[Member]) -> dict[str, BaseException]:
        return {}

    async def stop(self) -> None:
        await self.ask_all(self.members, "close")


class _Scorer:
    """`miles_core.run.scoring.Scorer`."""

    def __init__(
        self, rewards: Sequence[tuple[Component[RewardSpec], RewardSection]], plugin_set: Any, workers: int
    ) -> None:
        self._rewards = [
            (one.spec.name, section.weight, resolve(one.spec.ref)(one.options)) for one, section in rewards
        ]
        self.reward_weights = {name: weight for name, weight, _ in self._rewards}

    async def score(self, group: Group) -> Group:
        parts = {name: reward.score(group) for name, _, reward in self._rewards}
        total = [sum(weight * parts[name][place] for name, weight, _ in self._rewards) for place in range(len(group))]
        return [
            replace(sample, reward=total[place], rewards={name: scores[place] for name, scores in parts.items()})
            for place, sample in enumerate(group)
        ]

    def close(self) -> None:
        """There is nothing to close."""


class _Silence:
    """`miles_core.run.console.Console`."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None

    def phase(self, what: str) -> Any:
        return pytest.MonkeyPatch.context()  # a context that does nothing


class Even:
    """A reward that is quickly learnt: the share of the letters that have an even code, at first about a half."""

    def __init__(self, options: None) -> None: ...

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [sum(ord(letter) % 2 == 0 for letter in sample.text) / max(len(sample.text), 1) for sample in samples]


def catalog(*more: Spec) -> Catalog:
    """What is installed, with the reward `even` and other records, which miles-core seems to offer."""
    installed = discover()
    even = RewardSpec(name="even", ref=f"{__name__}:Even", summary="The share of even letters.")
    return Catalog(
        tuple(
            replace(plugin, records=(*plugin.records, even, *more)) if plugin.name == "miles-core" else plugin
            for plugin in installed.plugins
        )
    )


# ---- Weights from hand to hand --------------------------------------------------------------------------------------

_SYNC = WeightSyncSpec(
    name="from-hand-to-hand",
    ref=f"{__name__}:Sender",
    receiver=f"{__name__}:Receiver",
    trainer="torch",
    engine="torch",
    summary="Within a process.",
)
_sent: queue.Queue[list[Bucket]] = queue.Queue()


class Sender:
    """`roles.WeightSender` for one engine."""

    def __init__(self, context: Any, engines: int) -> None:
        assert engines == 1

    def open(self) -> str:
        return ""

    def connect(self) -> None: ...

    def send(self, buckets: Iterator[Bucket]) -> None:
        _sent.put(list(buckets))

    def give_up(self) -> None: ...
    def close(self) -> None: ...


class Receiver:
    """`roles.WeightReceiver`."""

    def __init__(self, context: Any, engines: int, address: str, layout: Any) -> None: ...

    def connect(self) -> None: ...

    def receive(self, load: Callable[[Sequence[str], Sequence[Any]], None]) -> None:
        for bucket in _sent.get(timeout=60):
            load(bucket.names, list(bucket.tensors().values()))

    def close(self) -> None: ...
