"""The engines as the collector sees them: one `generate`, whichever engine is free.

Calls made in the same turn of the event loop leave together, one message an engine, and so enter each engine together.
Results come back by one long poll an engine, many in one answer. What an engine aborted for a publish is asked again.
Who stops waiting is heard of by the engine, which aborts what nobody wants any more.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles_core.cluster.session import Member, translated
from miles_core.errors import RunError
from miles_core.sample import Completion, IntArray, Request, Sampling

POLL_S = 5.0
"""How long a poll waits in the engine; so much later than its deadline a silent engine may be noticed."""


@dataclass
class _Engine:
    """One engine and what it works on."""

    member: Member
    waiting: dict[str, tuple[int, asyncio.Future[list[Completion]]]] = field(default_factory=dict)
    busy_seconds: float = 0.0
    heard: float = 0.0
    poll: asyncio.Task[None] | None = None

    @property
    def load(self) -> int:
        """Completions that it owes."""
        return sum(count for count, _ in self.waiting.values())


class EnginePool:
    """engines: (name, actor, log) each. deadline_s: the longest silence of an engine that has work: that it neither
    finishes anything nor computes."""

    def __init__(self, engines: Sequence[tuple[str, Any, Path]], deadline_s: float) -> None:
        self._engines = [_Engine(Member(*engine)) for engine in engines]
        self._deadline_s = deadline_s
        self._ids = itertools.count()
        self._queue: list[tuple[Request, asyncio.Future[list[Completion]]]] = []
        self._left: set[asyncio.Future[list[Completion]]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.aborted = 0

    @property
    def busy_seconds(self) -> list[float]:
        """Seconds that each engine has computed."""
        return [engine.busy_seconds for engine in self._engines]

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
        if not self._queue:
            loop.call_soon(self._flush)
        self._queue.append((request, future))
        try:
            return await future
        except asyncio.CancelledError:
            if not self._left:
                loop.call_soon(self._flush_left)
            self._left.add(future)
            raise

    def _flush_left(self) -> None:
        """Tells the engines whom nobody waits for any more."""
        for engine in self._engines:
            names = [name for name, (_, future) in engine.waiting.items() if future in self._left]
            if names:
                self._spawn(self._abort(engine, names))
        self._left.clear()

    async def _abort(self, engine: _Engine, names: Sequence[str]) -> None:
        try:
            await engine.member.actor.abort.remote(names)
        except Exception as error:
            self._fail(engine, translated(error, engine.member, "abort"))

    def _flush(self) -> None:
        """Sends what was asked for in this turn, each request to the engine with the least to do."""
        shares: dict[int, list[Request]] = {}
        for request, future in self._queue:
            if future.cancelled():
                continue
            index = min(range(len(self._engines)), key=lambda place: self._engines[place].load)
            engine = self._engines[index]
            named = Request(
                id=str(next(self._ids)), tokens=request.tokens, sampling=request.sampling, seeds=request.seeds
            )
            engine.waiting[named.id] = (named.n, future)
            shares.setdefault(index, []).append(named)
        self._queue.clear()
        for index, requests in shares.items():
            engine = self._engines[index]
            self._spawn(self._submit(engine, requests))
            if engine.poll is None:
                engine.heard = time.monotonic()
                engine.poll = self._spawn(self._collect(engine))

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
                for name, result in finished:
                    self._deliver(engine, name, result)
                self._check_silence(engine, bool(finished) or busy_seconds > engine.busy_seconds)
                engine.busy_seconds = busy_seconds
        except Exception as error:
            self._fail(engine, translated(error, engine.member, "generate"))
        finally:
            engine.poll = None

    def _deliver(self, engine: _Engine, name: str, result: list[Completion] | BaseException) -> None:
        _, future = engine.waiting.pop(name, (0, None))
        if future is None or future.done():  # whoever waited has heard of a failure, or has gone
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

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
        """Everyone who waits for this engine hears why."""
        for name in list(engine.waiting):
            self._deliver(engine, name, error)
