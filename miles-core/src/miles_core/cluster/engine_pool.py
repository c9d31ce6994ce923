"""The engines as the collector sees them: one `generate`, whichever engine is free.

Calls made in the same turn of the event loop leave together, one message an engine, and so enter each engine together.
Results come back by one long poll an engine, many in one answer. What an engine aborted for a publish is asked again.
Who stops waiting is heard of by the engine, which aborts what nobody wants any more.

A prompt goes to the engine that has its beginning in its cache (`miles_core.cluster.affinity`), unless that one has
much more to do than another, and else to the engine with the least to do. All samples of one call stay together.

An engine that fails is taken out, and what it owes is asked of the others, once: what fails a second time is told to
who waits for it. Without any engine, requests wait for one to come back. What is wrong with a request (`UserError`) is
told at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from miles_core.cluster.affinity import Affinity
from miles_core.cluster.session import Member, translated
from miles_core.errors import RunError
from miles_core.roles import Measures, Quotient
from miles_core.sample import Completion, IntArray, Request, Sampling

_log = logging.getLogger(__name__)

BUSIER, BUSIER_BY = 1.5, 64
"""An engine has much more to do than another if it owes more completions by this factor, and by this number."""
MEASURE_S = 5.0
"""How long an engine may take to say what it has measured."""
POLL_S = 5.0
"""How long a poll waits in the engine; so much later than its deadline a silent engine may be noticed."""


@dataclass
class _Call:
    """What somebody waits for. moved: an engine that had it has failed."""

    request: Request
    future: asyncio.Future[list[Completion]]
    moved: bool = False


@dataclass
class _Engine:
    """One engine and what it works on. before: the `busy_seconds` of those in whose place it has come; lost: why it was
    taken out, None while it is not."""

    member: Member
    before: float = 0.0
    waiting: dict[str, _Call] = field(default_factory=dict)
    busy_seconds: float = 0.0
    heard: float = 0.0
    poll: asyncio.Task[None] | None = None
    lost: BaseException | None = None

    @property
    def load(self) -> int:
        """Completions that it owes."""
        return sum(call.request.n for call in self.waiting.values())


class EnginePool:
    """engines: (name, actor, log) each. deadline_s: the longest silence of an engine that has work: that it neither
    finishes anything nor computes."""

    def __init__(self, engines: Sequence[tuple[str, Any, Path]], deadline_s: float) -> None:
        self._engines = [_Engine(Member(*engine)) for engine in engines]
        self._deadline_s = deadline_s
        self._ids = itertools.count()
        self._affinity = Affinity()
        self._queue: list[_Call] = []
        self._told: set[str] = set()
        self._left: set[asyncio.Future[list[Completion]]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.aborted = 0

    async def measure(self) -> dict[str, float]:
        """What the engines have measured since the last call: those that answer in time."""
        alive = [engine.member.actor for engine in self._engines if engine.lost is None]
        asked = [asyncio.ensure_future(_answer(actor.measure.remote())) for actor in alive]
        done, late = await asyncio.wait(asked, timeout=MEASURE_S) if asked else ((), ())
        for task in late:
            task.cancel()
        return _together([task.result() for task in asked if task in done])

    @property
    def busy_seconds(self) -> list[float]:
        """Seconds that each engine has computed."""
        return [engine.busy_seconds for engine in self._engines]

    def go_without(self, dead: Mapping[str, BaseException]) -> dict[str, BaseException]:
        """Takes out engines that have been found dead. All that were taken out since the last call, by name, and
        why."""
        for engine in self._engines:
            if engine.lost is None and (reason := dead.get(engine.member.name)) is not None:
                self._fail(engine, reason)
        new = self._new()
        self._told |= new.keys()
        return dict(dead) | new

    @property
    def untold(self) -> bool:
        """Whether an engine was taken out since the last `go_without`."""
        return bool(self._new())

    def _new(self) -> dict[str, BaseException]:
        found = {engine.member.name: engine.lost for engine in self._engines if engine.lost is not None}
        return {name: reason for name, reason in found.items() if name not in self._told}

    def come_back(self, engines: Sequence[tuple[str, Any, Path]]) -> None:
        """These come in the place of those of their names, which were taken out."""
        places = {engine.member.name: place for place, engine in enumerate(self._engines)}
        for member in (Member(*engine) for engine in engines):
            place = places[member.name]
            before = self._engines[place].busy_seconds
            self._engines[place] = _Engine(member, before=before, busy_seconds=before)
            self._told.discard(member.name)
        if self._queue:
            asyncio.get_running_loop().call_soon(self._flush)

    async def generate(self, tokens: IntArray, seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """One completion per seed, in their order; asked again for as long as a publish aborts them."""
        while True:
            completions = await self._once(Request(id="", tokens=tokens, sampling=sampling, seeds=tuple(seeds)))
            if all(completion.status != "aborted" for completion in completions):
                return completions
            self.aborted += 1

    async def _once(self, request: Request) -> list[Completion]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Completion]] = loop.create_future()
        self._enqueue(_Call(request, future))
        try:
            return await future
        except asyncio.CancelledError:
            if not self._left:
                loop.call_soon(self._flush_left)
            self._left.add(future)
            raise

    def _enqueue(self, call: _Call) -> None:
        if not self._queue:
            asyncio.get_running_loop().call_soon(self._flush)
        self._queue.append(call)

    def _flush_left(self) -> None:
        """Tells the engines whom nobody waits for any more."""
        for engine in self._engines:
            names = [name for name, call in engine.waiting.items() if call.future in self._left]
            if names:
                self._spawn(self._abort(engine, names))
        self._left.clear()

    async def _abort(self, engine: _Engine, names: Sequence[str]) -> None:
        try:
            await engine.member.actor.abort.remote(names)
        except Exception as error:
            self._fail(engine, translated(error, engine.member, "abort"))

    def _flush(self) -> None:
        """Sends what was asked for in this turn, or since there was an engine."""
        if all(engine.lost is not None for engine in self._engines):
            return
        shares: dict[int, list[Request]] = {}
        queue, self._queue = self._queue, []
        for call in queue:
            if call.future.done():
                continue
            index = self._choose(call.request)
            name = str(next(self._ids))
            self._engines[index].waiting[name] = call
            shares.setdefault(index, []).append(replace(call.request, id=name))
        for index, requests in shares.items():
            engine = self._engines[index]
            self._spawn(self._submit(engine, requests))
            if engine.poll is None:
                engine.heard = time.monotonic()
                engine.poll = self._spawn(self._collect(engine))

    def _choose(self, request: Request) -> int:
        """The engine that the request goes to, by number."""
        loads = {place: engine.load for place, engine in enumerate(self._engines) if engine.lost is None}
        least = min(loads, key=loads.__getitem__)
        known = self._affinity.engine_of(request.tokens)
        if known is None or (loads[known] > BUSIER * loads[least] and loads[known] > loads[least] + BUSIER_BY):
            known = least
        self._affinity.note(request.tokens, known)
        return known

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _submit(self, engine: _Engine, requests: Sequence[Request]) -> None:
        try:
            await engine.member.actor.submit.remote(requests)
        except Exception as error:
            self._fail(engine, translated(error, engine.member, "submit"))

    async def _collect(self, engine: _Engine) -> None:
        """Polls the engine for as long as it has work."""
        try:
            while engine.waiting:
                finished, busy_seconds = await engine.member.actor.take.remote(POLL_S)
                busy_seconds += engine.before
                for name, result in finished:
                    self._deliver(engine, name, result)
                self._check_silence(engine, bool(finished) or busy_seconds > engine.busy_seconds)
                engine.busy_seconds = busy_seconds
        except Exception as error:
            self._fail(engine, translated(error, engine.member, "generate"))
        finally:
            engine.poll = None

    def _deliver(self, engine: _Engine, name: str, result: list[Completion] | BaseException) -> None:
        call = engine.waiting.get(name)
        if call is None:  # it was moved, or its engine was taken out
            return
        if isinstance(result, RunError) and not call.moved and self._others(engine):
            self._fail(engine, result)
            return
        del engine.waiting[name]
        _tell(call, result)

    def _others(self, engine: _Engine) -> bool:
        """Whether there is another engine that could do its work."""
        return any(other.lost is None for other in self._engines if other is not engine)

    def _check_silence(self, engine: _Engine, heard: bool) -> None:
        now = time.monotonic()
        if heard:
            engine.heard = now
        elif now - engine.heard > self._deadline_s:
            raise RunError(
                f"{engine.member.name} has neither finished nor computed anything for {self._deadline_s:g} s "
                f"(cluster.deadline_s), with {len(engine.waiting)} requests waiting (log: {engine.member.log})"
            )

    def _fail(self, engine: _Engine, error: BaseException) -> None:
        """The engine is taken out and others get its work; what has failed before is told to who waits for it."""
        calls = list(engine.waiting.values())
        engine.waiting.clear()
        if engine.lost is None:
            engine.lost = error
            self._affinity.forget(self._engines.index(engine))
            _log.warning("%s is taken out, with %d requests waiting: %s", engine.member.name, len(calls), error)
        for call in calls:
            if call.moved:
                _tell(call, error)
            elif not call.future.done():
                call.moved = True
                self._enqueue(call)


async def _answer(asked: Awaitable[Measures]) -> Measures:
    """What an engine has measured; nothing of one that fails, of which whoever asks it for tokens hears."""
    try:
        return await asked
    except Exception as error:
        _log.warning("an engine says nothing of itself: %s", error)
        return {}


def _together(answers: Sequence[Measures]) -> dict[str, float]:
    """Over all engines; a quotient of nothing is left out."""
    sums: dict[str, float] = {}
    quotients: dict[str, Quotient] = {}
    for name, number in (item for answer in answers for item in answer.items()):
        if isinstance(number, Quotient):
            before = quotients.get(name, Quotient(0.0, 0.0))
            quotients[name] = Quotient(before.part + number.part, before.whole + number.whole)
        else:
            sums[name] = sums.get(name, 0.0) + number
    return sums | {name: number.part / number.whole for name, number in quotients.items() if number.whole}


def _tell(call: _Call, result: list[Completion] | BaseException) -> None:
    if call.future.done():  # whoever waited has gone
        return
    if isinstance(result, BaseException):
        call.future.set_exception(result)
    else:
        call.future.set_result(result)
