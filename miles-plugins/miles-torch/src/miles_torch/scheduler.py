"""The engine's thread: which sequence generates when.

One thread owns all state. Other threads post orders, which it obeys between two steps; each order has a future. What
goes wrong on the thread ends it, reaches everyone who waits, and is told to everyone who posts later.
"""

from __future__ import annotations

import copy
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from miles_core.errors import RunError, UserError
from miles_core.roles import PauseMode
from miles_core.sample import Completion
from miles_torch.generator import Generation, Generator

Answer = tuple[str, list[Completion]] | Exception
"""What a job comes to: its id and completions, or why there are none."""


@dataclass(eq=False)
class Job:
    """A request on its way. deliver: takes the answer, on the engine's thread; it must not block."""

    id: str
    parts: list[Generation]
    deliver: Callable[[Answer], None]


class Scheduler:
    """Runs a `Generator`, which `build` makes on the thread itself. Every method may be called from any thread."""

    def __init__(self, name: str, build: Callable[[], Generator]) -> None:
        self.name = name
        self.busy_seconds = 0.0
        self._build = build
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._changed = threading.Condition()
        self._orders: deque[tuple[Callable[[], None], Future[None]]] = deque()  # guarded by _changed, as is _error
        self._error: Exception | None = None
        # The rest is the thread's own.
        self._generator: Generator | None = None
        self._version = -1
        self._waiting: deque[Generation] = deque()
        self._jobs: dict[Generation, Job] = {}
        self._mode: PauseMode | None = None
        self._quiet: list[Future[None]] = []
        self._asleep = False
        self._stopped = False
        self._tickets = 0

    # ---- Orders: from any thread -----------------------------------------------------------------------------

    def start(self) -> Future[None]:
        """Starts the thread; done when the generator is built."""
        future = self._post(lambda: None)
        self._thread.start()
        return future

    def submit(self, jobs: Sequence[Job]) -> Future[None]:
        """Jobs given together wait in line together. `UserError` if an id is in flight already."""
        return self._post(lambda: self._submit(jobs))

    def pause(self, mode: PauseMode) -> Future[None]:
        """Done when nothing generates any more."""
        quiet = _future()
        return self._post(lambda: self._pause(mode, quiet), quiet)

    def resume(self) -> Future[None]:
        """Ends a pause."""
        return self._post(self._resume)

    def abort(self, ids: Iterable[str] | None) -> Future[None]:
        """Ends jobs, all if None, with what they have. An id that is not in flight is none of its business."""
        wanted = None if ids is None else set(ids)
        return self._post(lambda: self._abort([job for job in self._in_flight() if wanted is None or job.id in wanted]))

    def drop(self, jobs: Sequence[Job]) -> Future[None]:
        """Ends these jobs, as far as they are in flight."""
        return self._post(lambda: self._abort(jobs))

    def set_version(self, version: int) -> Future[None]:
        """The weights are those of `version`."""
        return self._post(lambda: setattr(self, "_version", version))

    def work(self, work: Callable[[Generator], None]) -> Future[None]:
        """Has something computed between two steps."""
        return self._post(lambda: self._do(work))

    def sleep(self) -> Future[None]:
        """Gives the memory back. What runs goes back to the line with the tokens it has."""
        return self._post(self._sleep)

    def wake(self, *, works: bool = True) -> Future[None]:
        """Ends a sleep; not yet for what generates, unless it works."""
        return self._post(lambda: self._wake(works=works))

    def stop(self) -> None:
        """Aborts what is in flight and ends the thread; returns when it has ended."""
        self._post(self._stop)
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def generating(self) -> bool:
        """Whether a step may be going on."""
        return self._can_work()

    def _post(self, order: Callable[[], None], future: Future[None] | None = None) -> Future[None]:
        """Hands an order to the thread. Its future is done once it is obeyed, or failed with what it raised."""
        done = _future() if future is None else future
        with self._changed:
            if self._error is not None:
                done.set_exception(copy.copy(self._error))
            else:
                self._orders.append((order, done))
                self._changed.notify()
        return done

    # ---- The thread ------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._generator = self._build()
            with torch.inference_mode():
                while not self._stopped:
                    self._obey()
                    if self._can_work():
                        self._work(self._generator)
            self._fail(RunError(f"{self.name} is stopped"))
        except BaseException as error:
            self._fail(error)

    def _obey(self) -> None:
        """Carries out what was posted; waits for it while there is nothing else to do."""
        with self._changed:
            while not self._orders and not self._can_work():
                self._changed.wait()
            due = len(self._orders)
        for _ in range(due):
            order, future = self._orders[0]  # stays in the queue until it is obeyed, so that a failure reaches it
            try:
                order()
            except UserError as error:  # the caller's mistake, not the engine's
                future.set_exception(error)
            else:
                if future not in self._quiet:
                    _resolve(future)
            with self._changed:
                self._orders.popleft()
        self._settle()

    def _can_work(self) -> bool:
        if self._generator is None or self._version < 0 or self._asleep or self._stopped:
            return False
        if self._mode is None:
            return bool(self._generator.active or self._waiting)
        return self._mode == "drain" and bool(self._generator.active)

    def _work(self, generator: Generator) -> None:
        """One step: who waits enters where there is room, and everyone active gets a token."""
        begin = time.perf_counter()
        finished: list[Generation] = []
        if self._mode is None and self._waiting and generator.free:
            count = min(generator.free, len(self._waiting))
            finished += generator.admit([self._waiting.popleft() for _ in range(count)], self._version)
        if generator.active:
            finished += generator.step(self._version)
        self.busy_seconds += time.perf_counter() - begin
        self._finish(finished)
        self._settle()

    def _finish(self, parts: Iterable[Generation]) -> None:
        """Answers the jobs all of whose parts are over."""
        for part in parts:
            job = self._jobs.pop(part)
            if not any(other in self._jobs for other in job.parts):
                job.deliver((job.id, [each.completion() for each in job.parts]))

    def _settle(self) -> None:
        """Tells pauses that nothing generates any more, once that is so."""
        if self._quiet and not self._can_work():
            for future in self._quiet:
                _resolve(future)
            self._quiet.clear()

    def _fail(self, error: BaseException) -> None:
        """The thread ends by `error`: whoever waits hears of it, and so does whoever comes later."""
        if not isinstance(error, UserError | RunError):
            text = f"{self.name} failed: {type(error).__name__}: {error}"
            error = RunError(text, "".join(traceback.format_exception(error)))
        with self._changed:
            self._error = error
            futures = [future for _, future in self._orders] + self._quiet
            self._orders.clear()
        for future in futures:
            if not future.done():
                future.set_exception(copy.copy(error))
        for job in self._in_flight():
            job.deliver(copy.copy(error))

    # ---- What orders do: on the thread --------------------------------------------------------------------

    def _in_flight(self) -> list[Job]:
        """Jobs that are not answered yet, in order of arrival."""
        return list(dict.fromkeys(sorted(self._jobs.values(), key=lambda job: job.parts[0].ticket)))

    def _submit(self, jobs: Sequence[Job]) -> None:
        known = {job.id for job in self._jobs.values()}
        for job in jobs:
            if job.id in known:
                raise UserError(f"request id {job.id!r} is in flight already")
            known.add(job.id)
        for job in jobs:
            for part in job.parts:
                part.ticket = self._tickets
                self._tickets += 1
                self._jobs[part] = job
                self._waiting.append(part)

    def _pause(self, mode: PauseMode, quiet: Future[None]) -> None:
        self._mode = mode
        self._quiet.append(quiet)
        assert self._generator is not None
        if mode == "abort":
            self._abort(dict.fromkeys(self._jobs[part] for part in self._generator.active))
        elif mode == "retract":
            self._retract(self._generator)

    def _resume(self) -> None:
        self._mode = None
        for future in self._quiet:
            _resolve(future)
        self._quiet.clear()

    def _retract(self, generator: Generator) -> None:
        """Who generates goes back to the front of the line, in the order of arrival."""
        back = sorted(generator.active, key=lambda part: part.ticket, reverse=True)
        generator.remove(back)
        self._waiting.extendleft(back)

    def _abort(self, jobs: Iterable[Job]) -> None:
        """Ends whole jobs, the parts that have not begun too: a job is answered once."""
        assert self._generator is not None
        for job in jobs:
            parts = [part for part in job.parts if part in self._jobs]
            if not parts:
                continue
            self._generator.remove([part for part in self._generator.active if self._jobs[part] is job])
            self._waiting = deque(part for part in self._waiting if self._jobs[part] is not job)
            self._finish(parts)

    def _do(self, work: Callable[[Generator], None]) -> None:
        assert self._generator is not None
        begin = time.perf_counter()
        work(self._generator)
        self.busy_seconds += time.perf_counter() - begin

    def _sleep(self) -> None:
        assert self._generator is not None
        self._retract(self._generator)
        self._generator.sleep()
        self._asleep = True

    def _wake(self, *, works: bool) -> None:
        assert self._generator is not None
        self._generator.wake()
        self._asleep = not works

    def _stop(self) -> None:
        self._abort(self._in_flight())
        self._stopped = True


def _future() -> Future[None]:
    """A future that its waiter cannot cancel: the thread must always be able to answer."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


def _resolve(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)
