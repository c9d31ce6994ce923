"""Waiting for members: deadlines, deaths and failures. The members are objects of the test; Ray is not started."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError

from miles_core.cluster import session as sessions
from miles_core.cluster.process import MemberProcess
from miles_core.cluster.session import LOG_TAIL, Member, MemberDiedError, Place, Session, translated
from miles_core.config.schema import ClusterSection
from miles_core.errors import RunError, UserError


class Call:
    """What calling an actor's method gives."""

    def __init__(self, after_s: float, outcome: Any) -> None:
        self._after_s, self._outcome = after_s, outcome

    def remote(self, *args: Any) -> Call:
        self.args = args
        return self

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()

        def settle() -> None:
            outcome = self._outcome(*self.args) if callable(self._outcome) else self._outcome
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        if self._after_s < 60:
            asyncio.get_running_loop().call_later(self._after_s, settle)
        return future


class Actor:
    """Its one method `work` has the given outcome after so many seconds; 60 means never."""

    def __init__(self, after_s: float, outcome: Any) -> None:
        self.work = Call(after_s, outcome)
        self.close = Call(after_s, None)


def member(name: str, after_s: float, outcome: Any, folder: Path = Path("logs")) -> Member:
    return Member(name, Actor(after_s, outcome), folder / f"{name.replace(' ', '-')}.log")


def wait(*members: Member, deadline_s: float = 5.0) -> list[Any]:
    made = Session(ClusterSection(deadline_s=deadline_s), {}, Path("logs"))
    return asyncio.run(made.ask_all(members, "work", 3))


def task_error(cause: Exception) -> BaseException:
    """As Ray wraps what a method raised."""
    error: BaseException = RayTaskError(
        "work", "a long story", cause, "ray::X", 1, "127.0.0.1", "X", "0" * 32
    ).as_instanceof_cause()
    return error


def test_answers_come_in_the_order_of_the_members() -> None:
    double: Callable[[int], int] = lambda value: 2 * value  # noqa: E731
    assert wait(member("a", 0.03, 1), member("b", 0.0, double), member("c", 0.01, None)) == [1, 6, None]


def test_who_is_late_is_named_with_the_method_and_the_log() -> None:
    with pytest.raises(RunError) as caught:
        wait(member("trainer 0", 0, None), member("trainer 1", 60, None), member("engine 0", 60, None), deadline_s=0.05)
    assert caught.value.message == (
        "no answer within 0.05 s (cluster.deadline_s): "
        "trainer 1 in work (log: logs/trainer-1.log); engine 0 in work (log: logs/engine-0.log)"
    )


def test_who_is_late_is_named_although_another_gave_up_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "GRACE_S", 0.02)
    with pytest.raises(RunError) as caught:
        wait(
            member("trainer 0", 0.29, task_error(RunError("trainer 0 failed: gloo timed out"))),
            member("trainer 1", 60, None),
            deadline_s=0.3,
        )
    assert caught.value.message == (
        "no answer within 0.3 s (cluster.deadline_s): trainer 1 in work (log: logs/trainer-1.log)\n"
        "whereupon trainer 0 failed: gloo timed out"
    )


def test_a_failure_does_not_wait_for_those_who_never_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "GRACE_S", 0.05)
    with pytest.raises(UserError, match="no such file"):
        wait(member("a", 60, None), member("b", 0, task_error(UserError("no such file"))), deadline_s=30)


def test_a_death_is_named_before_the_failures_that_it_caused(tmp_path: Path) -> None:
    (tmp_path / "trainer-1.log").write_text("".join(f"line {number}\n" for number in range(LOG_TAIL + 7)))
    with pytest.raises(MemberDiedError) as caught:
        wait(
            member("trainer 0", 0, task_error(RunError("trainer 0 failed: connection closed by peer"))),
            member("trainer 1", 0.1, ActorDiedError(), tmp_path),
            member("trainer 2", 60, None),
        )
    head, *lines = caught.value.message.splitlines()
    assert head == f"trainer 1 died in work; the last lines of its log, {tmp_path}/trainer-1.log:"
    assert lines == [f"    line {number}" for number in range(7, LOG_TAIL + 7)]


def test_the_first_of_several_failures_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "GRACE_S", 0.1)
    with pytest.raises(RunError, match="the loss is not finite"):
        wait(
            member("trainer 0", 0.05, task_error(RunError("connection closed"))),
            member("trainer 1", 0.0, task_error(RunError("the loss is not finite"))),
        )


def test_a_member_that_died_in_silence_says_so(tmp_path: Path) -> None:
    for asked, said in (("start", "engine 0 died in start; "), ("ping", "engine 0 died; ")):
        error = translated(ActorDiedError(), member("engine 0", 0, None, tmp_path), asked)
        assert isinstance(error, MemberDiedError)
        assert error.message.startswith(said)
        assert error.message.endswith("(it wrote nothing)")


def test_a_member_that_could_not_be_made_shows_rays_account_of_it() -> None:
    cause = RayTaskError("__init__", "ImportError: no torch here", ImportError("no torch"), "ray::X", 1, "127.0.0.1")
    error = translated(ActorDiedError(cause), member("engine 0", 0, None), "enter")
    assert isinstance(error, RunError)
    assert not isinstance(error, MemberDiedError)
    assert error.cause is not None
    assert "ImportError: no torch here" in error.cause


def test_what_is_beside_each_other_is_reserved_on_one_machine() -> None:
    places = {
        "trainer 0": Place(cpus=1, gpus=1, beside="engine 0"),
        "trainer 1": Place(cpus=1, gpus=1, beside="engine 0"),
        "engine 0": Place(cpus=2),
        "collector": Place(cpus=1),
    }
    assert sessions.bundles(places) == {"engine 0": {"CPU": 4, "GPU": 2}, "collector": {"CPU": 1}}


def test_the_end_asks_members_to_end_and_then_kills_them(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(sessions, "CLOSE_S", 0.05)
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(ray, "shutdown", lambda: killed.append("cluster"))
    made = Session(ClusterSection(), {}, Path("logs"))
    made.members = [member("trainer 0", 60, None), member("collector", 0, None)]
    actors = [one.actor for one in made.members]
    asyncio.run(made.stop())
    assert all(hasattr(actor.close, "args") for actor in actors)
    assert killed == [*actors, "cluster"]


def test_what_nobody_waits_for_is_there_when_it_is_and_is_given_up_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kill", "shutdown"):
        monkeypatch.setattr(ray, name, lambda *args: None)
    made = Session(ClusterSection(), {}, Path("logs"))

    async def use() -> None:
        members = [member("a", 0, None), member("b", 0, ValueError("it died")), member("c", 60, None)]
        answered, died, never = (made.pending(one, "work") for one in members)
        await asyncio.wait([answered, died])
        assert not never.done()
        await made.stop()
        assert never.cancelled()

    asyncio.run(use())


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_cluster_that_does_not_start_is_tried_twice_and_then_told(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Any] = []

    def start(**options: Any) -> None:
        starts.append(options)
        if len(starts) <= failures:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    made = Session(ClusterSection(), {}, Path("logs"))
    if failures < 2:
        made._connect()
    else:
        with pytest.raises(RunError, match=r"Ray does not start on this machine: .* timed out during startup"):
            made._connect()
    assert len(starts) == min(failures + 1, 2)


# ---- What leaves a member -------------------------------------------------------------------------------------------


class Stubborn(Exception):
    """It cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Worker(MemberProcess):
    """Raises what it is given."""

    def work(self, error: Exception) -> None:
        raise error

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def wait(self, error: Exception) -> None:
        raise error

    def _inner(self, error: Exception) -> None:
        raise error


@pytest.fixture
def worker() -> Worker:
    plan: Any = SimpleNamespace(cluster=ClusterSection(deadline_s=0.2))
    return Worker("trainer 1", Path("logs/trainer-1.log"), plan)


def test_a_call_that_others_are_about_to_give_up_says_where_it_stands(
    worker: Worker, capfd: pytest.CaptureFixture[str]
) -> None:
    with capfd.disabled(), tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            worker.sleep(0.4)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        log.seek(0)
        text = log.read().decode()
    assert "Timeout" in text
    assert "in sleep" in text


def test_what_a_member_raises_travels_with_its_traceback(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    for call in (lambda: worker.work(Stubborn(1, 2)), lambda: asyncio.run(worker.wait(Stubborn(1, 2)))):
        with pytest.raises(RunError) as caught:
            call()
        there = pickle.loads(pickle.dumps(caught.value))
        assert there.message.startswith("trainer 1 failed in w")
        assert there.message.endswith("(log: logs/trainer-1.log): Stubborn: 1 and 2")
        assert "Traceback (most recent call last)" in there.cause
        assert "raise error\n" in there.cause
        assert there.cause in capfd.readouterr().err, "it stands in the log too"


def test_errors_for_people_leave_a_member_as_they_are(worker: Worker) -> None:
    for error in (UserError("data.jsonl:3: not JSON"), RunError("the loss is not finite", "trace")):
        with pytest.raises(type(error)) as caught:
            worker.work(error)
        assert caught.value is error


def test_a_full_disk_in_a_member_needs_no_traceback(worker: Worker) -> None:
    with pytest.raises(RunError) as caught:
        worker.work(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights.safetensors"))
    assert caught.value.message == "trainer 1 cannot write weights.safetensors: No space left on device"
    assert caught.value.cause is None


def test_a_full_disk_is_told_of_although_the_log_is_on_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "buffer.npz")

    def refuse() -> None:
        raise full

    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    monkeypatch.setattr(log, "flush", refuse)
    with pytest.raises(RunError, match=r"^trainer 1 cannot write buffer\.npz: No space left on device$"):
        asyncio.run(worker.wait(full))


def test_only_what_others_call_is_guarded(worker: Worker) -> None:
    with pytest.raises(Stubborn):
        worker._inner(Stubborn(1, 2))
    assert asyncio.iscoroutinefunction(Worker.wait), "Ray looks at this to make an asynchronous actor"


def test_a_member_looks_for_no_plugin_that_its_run_disables(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from types import SimpleNamespace
from miles_core.cluster.process import MemberProcess
from miles_core.plugins import discover
folder = Path({str(tmp_path)!r})
plan = SimpleNamespace(directory=folder, plugin_set=(), values={{"plugins": {{"disable": ["*"]}}}})
MemberProcess("engine 0", folder / "engine.log", plan)._enter()
folder.joinpath("active").write_text(" ".join(one.name for one in discover().plugins if one.status == "active"))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "active").read_text() == "miles-core"
