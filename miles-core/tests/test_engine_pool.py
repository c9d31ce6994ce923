"""The pool of engines, with engines that are objects of the test instead of Ray actors."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_core.cluster import engine_pool
from miles_core.cluster.affinity import BLOCK, Affinity
from miles_core.cluster.engine_pool import EnginePool
from miles_core.errors import RunError, UserError
from miles_core.roles import Measures, Quotient
from miles_core.sample import Completion, Request, Sampling, Status

PROMPT = np.array([1, 2, 3], np.int32)


class Method:
    """What calling `actor.method.remote(...)` needs."""

    def __init__(self, function: Callable[..., Awaitable[Any]]) -> None:
        self.remote = function


class Engine:
    """Keeps what is submitted until the test says what comes of it."""

    def __init__(self) -> None:
        self.submit, self.take, self.abort = Method(self._submit), Method(self._take), Method(self._abort)
        self.measure = Method(self._measure)
        self.aborted: list[list[str]] = []
        self.batches: list[list[Request]] = []
        self.results: list[tuple[str, Any]] = []
        self.busy_seconds = 0.0
        self.measures: Measures | Exception | None = None
        self.broken: Exception | None = None
        self.polls = 0
        self._news = asyncio.Event()

    async def _submit(self, requests: Sequence[Request]) -> None:
        if self.broken:
            raise self.broken
        self.batches.append(list(requests))

    async def _measure(self) -> Measures:
        if self.measures is None:
            await asyncio.Event().wait()
        if isinstance(self.measures, Exception):
            raise self.measures
        assert self.measures is not None
        return self.measures

    async def _take(self, patience_s: float) -> tuple[list[tuple[str, Any]], float]:
        self.polls += 1
        if not self.results:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self._news.wait()
        if self.broken:
            raise self.broken
        taken, self.results = self.results, []
        return taken, self.busy_seconds

    async def _abort(self, ids: Sequence[str]) -> None:
        self.aborted.append(list(ids))
        for request in self.requests:
            if request.id in ids:
                self.finish(request, "aborted")

    def wake(self) -> None:
        self._news.set()

    def finish(self, request: Request, status: Status = "completed") -> None:
        """Each completion is its seed."""
        completions = [
            Completion(
                tokens=np.array([seed], np.int32),
                logprobs=np.zeros(1, np.float32),
                versions=np.zeros(1, np.int32),
                status=status,
            )
            for seed in request.seeds
        ]
        self.results.append((request.id, completions))
        self.wake()

    @property
    def requests(self) -> list[Request]:
        return [request for batch in self.batches for request in batch]


def pool_of(*engines: Engine, deadline_s: float = 30.0) -> EnginePool:
    return EnginePool(
        [(f"engine {index}", engine, Path(f"engine-{index}.log")) for index, engine in enumerate(engines)], deadline_s
    )


def ask(pool: EnginePool, *seeds: int) -> asyncio.Task[list[Completion]]:
    return asyncio.create_task(pool.generate(PROMPT, seeds, Sampling()))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def seeds_of(completions: Sequence[Completion]) -> list[int]:
    return [int(completion.tokens[0]) for completion in completions]


def test_calls_of_one_turn_leave_together_and_the_least_busy_engine_gets_the_next() -> None:
    async def run() -> None:
        engines = Engine(), Engine()
        pool = pool_of(*engines)
        tasks = [ask(pool, 1, 2, 3), ask(pool, 4), ask(pool, 5), ask(pool, 6), ask(pool, 7)]
        await settle()
        assert [[request.seeds for request in batch] for batch in engines[0].batches] == [[(1, 2, 3), (7,)]]
        assert [[request.seeds for request in batch] for batch in engines[1].batches] == [[(4,), (5,), (6,)]]
        for engine in engines:
            for request in reversed(engine.requests):
                engine.finish(request)
        assert [seeds_of(completions) for completions in await asyncio.gather(*tasks)] == [
            [1, 2, 3],
            [4],
            [5],
            [6],
            [7],
        ]
        assert all(np.array_equal(request.tokens, PROMPT) for engine in engines for request in engine.requests)

    asyncio.run(run())


def test_what_a_publish_aborted_is_asked_again_as_a_whole() -> None:
    async def run() -> None:
        engine = Engine()
        pool = pool_of(engine)
        task = ask(pool, 8, 9)
        for tries in (1, 2):
            await settle()
            assert len(engine.requests) == tries
            engine.finish(engine.requests[-1], "aborted")
            await settle()
            assert not task.done()
        await settle()
        engine.finish(engine.requests[-1])
        assert seeds_of(await task) == [8, 9]
        assert pool.aborted == 2
        assert len({request.id for request in engine.requests}) == 3

    asyncio.run(run())


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    count=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
)
def test_every_call_gets_its_own_completions_whatever_finishes_first(sizes: list[int], count: int, order: Any) -> None:
    async def run() -> None:
        engines = [Engine() for _ in range(count)]
        pool = pool_of(*engines)
        tasks = [ask(pool, *range(100 * place, 100 * place + size)) for place, size in enumerate(sizes)]
        await settle()
        open_requests = [(engine, request) for engine in engines for request in engine.requests]
        order.shuffle(open_requests)
        for engine, request in open_requests:
            engine.finish(request)
            if order.random() < 0.5:
                await settle()
        for place, (task, size) in enumerate(zip(tasks, sizes, strict=True)):
            assert seeds_of(await task) == list(range(100 * place, 100 * place + size))

    asyncio.run(run())


def test_nobody_polls_an_engine_that_has_nothing_to_do() -> None:
    async def run() -> None:
        engine = Engine()
        pool = pool_of(engine)
        for seed in (1, 2):
            task = ask(pool, seed)
            await settle()
            engine.finish(engine.requests[-1])
            await task
        await settle()
        assert engine.polls == 2

    asyncio.run(run())


@pytest.mark.parametrize("at", ["submit", "take", "serve"])
def test_what_a_failed_engine_owes_is_asked_of_another_and_nothing_more_of_it(at: str) -> None:
    async def run() -> None:
        sick, healthy = Engine(), Engine()
        pool = pool_of(sick, healthy)
        gone = RunError("engine 0 is gone")
        if at == "submit":
            sick.broken = gone
        tasks = [ask(pool, 1, 2), ask(pool, 3), ask(pool, 4), ask(pool, 5)]
        await settle()
        if at == "serve":
            sick.results.append((sick.requests[0].id, gone))
        else:
            sick.broken = gone
        sick.wake()
        await settle()
        for request in healthy.requests:
            healthy.finish(request)
        assert [seeds_of(completions) for completions in await asyncio.gather(*tasks)] == [[1, 2], [3], [4], [5]]
        assert sorted(request.seeds for request in healthy.requests) == [(1, 2), (3,), (4,), (5,)]
        assert pool.go_without({}) == {"engine 0": gone}
        assert pool.go_without({}) == {}  # told once
        later = [ask(pool, seed) for seed in (6, 7)]
        await settle()
        for request in healthy.requests[-2:]:
            healthy.finish(request)
        assert [seeds_of(await task) for task in later] == [[6], [7]]

    asyncio.run(run())


def come_back(pool: EnginePool, index: int) -> Engine:
    """Another engine in the place of one."""
    engine = Engine()
    pool.come_back([(f"engine {index}", engine, Path(f"engine-{index}.log"))])
    return engine


def test_an_engine_that_is_found_dead_is_left_and_its_request_fails_with_the_second_that_dies() -> None:
    async def run() -> None:
        engines = Engine(), Engine()
        pool = pool_of(*engines)
        task = ask(pool, 1)
        await settle()
        dead = RunError("engine 0 died")
        assert pool.go_without({"engine 0": dead}) == {"engine 0": dead}
        await settle()
        assert [request.seeds for request in engines[1].requests] == [(1,)]
        engines[1].broken = RunError("engine 1 is gone")
        engines[1].wake()
        with pytest.raises(RunError, match="engine 1 is gone"):
            await task

    asyncio.run(run())


def test_without_any_engine_requests_wait_for_one_to_come_back_and_the_old_one_says_nothing_more() -> None:
    async def run() -> None:
        old = Engine()
        pool = pool_of(old)
        owed = ask(pool, 1)
        await settle()
        old.busy_seconds = 2.0
        old.results.append(("none of ours", []))
        old.wake()
        await settle()
        old.broken = gone = RunError("engine 0 is gone")
        old.wake()
        await settle()
        later, given_up = ask(pool, 2), ask(pool, 3)
        await settle()
        given_up.cancel()
        known = [pool.untold]
        assert pool.go_without({}) == {"engine 0": gone}
        new = come_back(pool, 0)
        await settle()
        assert sorted(request.seeds for request in new.requests) == [(1,), (2,)]
        new.busy_seconds = 0.5
        for request in new.requests:
            new.finish(request)
        assert [seeds_of(await task) for task in (owed, later)] == [[1], [2]]
        assert pool.busy_seconds == [2.5]  # of both
        assert pool.go_without({}) == {}
        assert [*known, pool.untold] == [True, False]
        assert pool.go_without({"engine 0": gone}) == {"engine 0": gone}  # it can be lost again
        assert [request.seeds for request in old.requests] == [(1,)]

    asyncio.run(run())


def test_what_engines_measure_is_put_together_without_those_that_fail_or_take_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_pool, "MEASURE_S", 0.05)

    async def run() -> None:
        engines = [Engine() for _ in range(4)]
        pool = pool_of(*engines)
        engines[0].measures = {"tokens": 3.0, "hits": Quotient(1.0, 4.0), "waits": Quotient(0.0, 0.0)}
        engines[1].measures = {"tokens": 4.0, "hits": Quotient(2.0, 2.0), "waits": Quotient(0.0, 0.0)}
        engines[2].measures = RunError("it has nothing to say")
        assert await pool.measure() == {"tokens": 7.0, "hits": 0.5}  # not the mean of 1/4 and 1
        for engine in engines:
            engine.measures = {"tokens": 1.0}
        pool.go_without({"engine 1": RunError("engine 1 is gone")})
        assert await pool.measure() == {"tokens": 3.0}

    asyncio.run(run())


def test_a_request_that_kills_an_engine_does_not_kill_them_all() -> None:
    async def run() -> None:
        engines = Engine(), Engine(), Engine()
        pool = pool_of(*engines)
        task = ask(pool, 1)
        await settle()
        engines[0].results.append((engines[0].requests[0].id, RunError("first")))
        engines[0].wake()
        await settle()
        engines[1].results.append((engines[1].requests[0].id, RunError("second")))
        engines[1].wake()
        with pytest.raises(RunError, match="second"):
            await task
        assert list(pool.go_without({})) == ["engine 0"]
        assert engines[2].requests == []

    asyncio.run(run())


def test_bad_input_is_told_at_once_and_costs_no_engine() -> None:
    async def run() -> None:
        engines = Engine(), Engine()
        pool = pool_of(*engines)
        task = ask(pool, 1)
        await settle()
        engines[0].results.append((engines[0].requests[0].id, UserError("too long")))
        engines[0].wake()
        with pytest.raises(UserError, match="too long"):
            await task
        assert pool.go_without({}) == {}

    asyncio.run(run())


def test_a_prompt_that_continues_another_goes_where_that_went_until_there_is_too_much_to_do() -> None:
    def long(*parts: int) -> np.ndarray:
        return np.repeat(np.array(parts, np.int32), 100)

    async def run() -> None:
        engines = Engine(), Engine()
        pool = pool_of(*engines)

        async def sent(tokens: np.ndarray, count: int = 1) -> int:
            before = [len(engine.requests) for engine in engines]
            task = asyncio.create_task(pool.generate(tokens, range(count), Sampling()))
            tasks.append(task)
            await settle()
            (place,) = [at for at, engine in enumerate(engines) if len(engine.requests) > before[at]]
            return place

        tasks: list[asyncio.Task[list[Completion]]] = []
        assert await sent(long(1, 2), 8) == 0
        assert await sent(long(1, 3), 4) == 1  # a common first half alone draws nothing
        assert await sent(long(1, 2)) == 0  # another sample of the prompt, though engine 1 has less to do
        assert await sent(long(1, 2, 9)) == 0  # the next turn
        assert await sent(long(1, 3, 9)) == 1
        assert await sent(long(7)) == 1
        assert await sent(long(1, 2, 9, 9), 70) == 0
        assert await sent(long(1, 2, 9, 9, 9)) == 1  # engine 0 owes 80, engine 1 6
        assert await sent(long(1, 2, 9, 9, 9, 9)) == 1  # whose cache has the most of it now
        for engine in engines:
            for request in engine.requests:
                engine.finish(request)
        await asyncio.gather(*tasks)

    asyncio.run(run())


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=3 * BLOCK), max_size=12), st.integers(0, 10**6))
def test_the_longest_earlier_prompt_is_found(prompts: list[list[int]], choice: int) -> None:
    prompts = [prompt * (1 + choice % 3) for prompt in prompts]
    affinity = Affinity()
    for place, prompt in enumerate(prompts):
        affinity.note(np.array(prompt, np.int32), place)
    asked = (prompts[choice % len(prompts)] if prompts else []) + [choice] * (choice % 40)
    heads = [prompt[: len(prompt) // BLOCK * BLOCK] for prompt in prompts]
    fitting = [(len(head), place) for place, head in enumerate(heads) if head and asked[: len(head)] == head]
    assert affinity.engine_of(np.array(asked, np.int32)) == (max(fitting)[1] if fitting else None)


def test_a_request_that_an_engine_could_not_serve_fails_alone() -> None:
    async def run() -> None:
        engine = Engine()
        pool = pool_of(engine)
        tasks = [ask(pool, 1), ask(pool, 2)]
        await settle()
        engine.results.append((engine.requests[0].id, RunError("too long")))
        engine.finish(engine.requests[1])
        with pytest.raises(RunError, match="too long"):
            await tasks[0]
        assert seeds_of(await tasks[1]) == [2]

    asyncio.run(run())


def test_a_silent_engine_is_named_with_its_log_and_one_that_computes_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_pool, "POLL_S", 0.01)

    async def run() -> None:
        engine = Engine()
        pool = pool_of(engine, deadline_s=0.05)
        task = ask(pool, 1)
        for _ in range(8):
            await asyncio.sleep(0.02)
            engine.busy_seconds += 1.0
        assert not task.done()
        assert pool.busy_seconds[0] > 0
        message = r"engine 0 has neither .* for 0.05 s \(cluster.deadline_s\), with 1 requests .*log: engine-0.log"
        async with asyncio.timeout(10):
            while not (lost := pool.go_without({})):  # noqa: ASYNC110 — nobody else is told
                await asyncio.sleep(0.02)
        assert re.search(message, str(lost["engine 0"]))
        task.cancel()

    asyncio.run(run())


def test_an_engine_hears_that_nobody_waits_any_more_once_for_all_of_a_turn() -> None:
    async def run() -> None:
        engine = Engine()
        pool = pool_of(engine)
        tasks = [ask(pool, seed) for seed in range(4)]
        await settle()
        late = ask(pool, 9)  # it leaves before its request does
        await asyncio.sleep(0)
        for task in (tasks[0], tasks[2], late):
            task.cancel()
        await settle()
        assert [request.seeds for request in engine.requests] == [(0,), (1,), (2,), (3,)]
        gone = [request.id for request in engine.requests if request.seeds in ((0,), (2,))]
        assert engine.aborted == [gone]
        for request in engine.requests:
            if request.id not in gone:
                engine.finish(request)
        assert [seeds_of(await task) for task in (tasks[1], tasks[3])] == [[1], [3]]
        for task in (tasks[0], tasks[2], late):
            with pytest.raises(asyncio.CancelledError):
                await task
        await settle()
        assert pool._engines[0].load == 0
        assert pool.aborted == 0

    asyncio.run(run())
