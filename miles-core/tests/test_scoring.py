"""`Scorer`: rewards in worker processes, whatever they do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from miles_core.config.schema import Component, RewardSection
from miles_core.run.scoring import Scorer
from miles_core.sample import Sample
from miles_core.specs import RewardSpec

REWARDS = '''
import os, time

class Length:
    def __init__(self, options): self.factor = options or 1.0
    def score(self, samples): return [self.factor * len(s.text) for s in samples]

class Place:
    def __init__(self, options): ...
    def score(self, samples): return [s.index for s in samples]

class Behaves:
    """Does what the sample's text says."""
    def __init__(self, options): ...
    def score(self, samples): return [self.one(s.text) for s in samples]
    def one(self, text):
        if text == "raise": raise KeyError("no such thing")
        if text == "nan": return float("nan")
        if text == "none": return None
        if text == "die": os._exit(7)
        if text == "leave": raise SystemExit(0)
        if text == "loop in C": sum(range(10**13))
        if text == "sleep": time.sleep(60)
        return 1.0

class TooFew:
    def __init__(self, options): ...
    def score(self, samples): return [1.0] * (len(samples) - 1)

class Relative:
    """Needs the whole group."""
    def __init__(self, options): ...
    def score(self, samples): return [1 / (len(samples) - 1 - s.index) for s in samples]

class Pid:
    def __init__(self, options): ...
    def score(self, samples): return [os.getpid()] * len(samples)

class Unbuildable:
    def __init__(self, options): raise ValueError("bad options")
'''


@pytest.fixture(scope="module", autouse=True)
def reward_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "scored_rewards.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        yield


def reward(
    name: str,
    *,
    weight: float = 1.0,
    timeout_s: float = 30.0,
    scope: Literal["sample", "group"] = "sample",
    options: Any = None,
    plugin: str = "miles-core",
) -> tuple[Component[RewardSpec], RewardSection]:
    kebab = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in name).strip("-")
    spec = RewardSpec(name=kebab, ref=f"scored_rewards:{name}", summary="A test's.", scope=scope)
    return Component(spec=spec, plugin=plugin, options=options), RewardSection(
        name=kebab, weight=weight, timeout_s=timeout_s
    )


def group(*texts: str) -> list[Sample]:
    tokens = np.array([1, 2], np.int32)
    return [
        Sample(
            group=3,
            index=index,
            prompt=tokens,
            response=tokens,
            mask=np.ones(2, np.bool_),
            logprobs=np.zeros(2, np.float32),
            versions=tokens,
            status="completed",
            text=text,
        )
        for index, text in enumerate(texts)
    ]


@contextlib.contextmanager
def scorer(*rewards: tuple[Component[RewardSpec], RewardSection], workers: int = 1) -> Iterator[Scorer]:
    made = Scorer(rewards, (), workers)
    try:
        yield made
    finally:
        made.close()


def scored(made: Scorer, samples: Sequence[Sample]) -> list[Sample]:
    return asyncio.run(made.score(list(samples)))


def test_the_reward_is_the_weighted_sum_of_all_rewards() -> None:
    with scorer(reward("Length", weight=2.0, options=0.5), reward("Place", weight=-1.0)) as made:
        result = scored(made, group("ab", "abcd"))
    assert [sample.reward for sample in result] == [2 * 0.5 * 2 - 0, 2 * 0.5 * 4 - 1]
    assert [dict(sample.rewards) for sample in result] == [{"length": 1.0, "place": 0.0}, {"length": 2.0, "place": 1.0}]
    assert {sample.status for sample in result} == {"completed"}
    assert not made.failures
    assert 0 < made.busy_seconds < 1


def test_one_reward_twice_is_told_apart() -> None:
    with scorer(reward("Length"), reward("Length", options=10.0)) as made:
        assert scored(made, group("abc"))[0].rewards == {"length": 3.0, "length-2": 30.0}
        assert set(made.reward_weights) == {"length", "length-2"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise", "behaves: KeyError: 'no such thing'"),
        ("nan", "behaves: the score is nan"),
        ("none", "behaves: TypeError: float() argument must be"),
        ("leave", "behaves: SystemExit: 0"),
    ],
)
def test_a_sample_that_a_reward_fails_on_is_marked_and_counted_alone(text: str, error: str) -> None:
    with scorer(reward("Behaves"), reward("Place")) as made:
        good, bad = scored(made, group("fine", text))
    assert (good.status, good.reward, good.error) == ("completed", 1.0, None)
    assert (bad.status, bad.reward, bad.rewards) == ("failed", 0.0, {"place": 1.0})
    assert bad.error is not None
    assert bad.error.startswith(error)
    assert made.failures == {"behaves": 1}
    assert made.last_traceback is not None
    assert error.partition(": ")[2] in made.last_traceback


def test_a_reward_of_groups_fails_for_the_whole_group() -> None:
    with scorer(reward("Relative", scope="group")) as made:
        result = scored(made, group("a", "b"))
    assert [sample.error for sample in result] == ["relative: ZeroDivisionError: division by zero"] * 2
    assert made.failures == {"relative": 2}


def test_a_wrong_number_of_scores_fails_the_group() -> None:
    with scorer(reward("TooFew", scope="group")) as made:
        result = scored(made, group("a", "b"))
    assert {sample.error for sample in result} == {"too-few: ValueError: returned 1 scores for 2 samples"}


def test_a_reward_that_cannot_be_built_fails_every_sample_and_says_why() -> None:
    with scorer(reward("Unbuildable"), reward("Missing")) as made:
        (result,) = scored(made, group("a"))
    assert result.error is not None
    assert "unbuildable could not be built: ValueError: bad options" in result.error
    assert "missing could not be built: AttributeError" in result.error


def test_a_plugin_of_another_version_is_refused() -> None:
    made = Scorer([reward("Length")], [("miles-core", "0.0.1", "miles_core.builtin")], 1)
    try:
        (result,) = scored(made, group("a"))
    finally:
        made.close()
    assert result.error is not None
    assert "the run began with 0.0.1" in result.error


@pytest.mark.parametrize("text", ["loop in C", "sleep"])
def test_a_reward_past_its_time_limit_is_killed_and_the_next_group_is_scored(text: str) -> None:
    with scorer(reward("Behaves", timeout_s=0.3), reward("Place")) as made:
        scored(made, group("fine"))
        began = time.monotonic()
        late = asyncio.run(asyncio.wait_for(made.score(group(text)), 60))
        took = time.monotonic() - began
        (fine,) = scored(made, group("fine"))
    assert late[0].error == "behaves: not done after 0.3 s (reward.timeout_s)"
    assert (late[0].reward, late[0].rewards) == (0.0, {"place": 0.0})
    assert made.failures == {"behaves": 1}
    assert took < 10
    assert fine.reward == 1.0


def test_a_reward_that_takes_its_process_down_is_marked_and_counted() -> None:
    with scorer(reward("Behaves")) as made:
        (dead,) = scored(made, group("die"))
        (fine,) = scored(made, group("fine"))
    assert dead.error == "behaves: its process died with exit code 7"
    assert fine.reward == 1.0


def test_an_idle_worker_that_is_killed_is_replaced() -> None:
    with scorer(reward("Pid")) as made:
        (sample,) = scored(made, group("a"))
        assert sample.reward is not None
        os.kill(int(sample.reward), signal.SIGKILL)
        time.sleep(0.5)
        (other,) = scored(made, group("a"))
    assert other.status == "completed"
    assert other.reward != sample.reward


def test_many_groups_are_scored_at_once_by_all_workers() -> None:
    async def all_groups(made: Scorer) -> list[list[Sample]]:
        return await asyncio.gather(*(made.score(group("a" * length)) for length in range(50)))

    with scorer(reward("Length"), workers=2) as made:
        results = asyncio.run(all_groups(made))
    assert [result[0].reward for result in results] == list(range(50))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_close_leaves_no_process_even_while_a_reward_loops() -> None:
    async def start_loop(made: Scorer) -> int:
        (sample,) = await made.score(group("a"))
        asyncio.get_running_loop().create_task(made.score(group("loop in C")))
        await asyncio.sleep(0.5)
        made.close()
        return int(sample.rewards["pid"])

    pid = asyncio.run(start_loop(Scorer([reward("Pid"), reward("Behaves")], (), 1)))
    assert not alive(pid)


@pytest.mark.parametrize("text", ["idle", "sleep", "loop in C"])
def test_workers_end_when_their_parent_is_killed(text: str, tmp_path: Path) -> None:
    """No one is left to kill a worker, so it ends by itself; in a loop in C, by its CPU limit."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio, importlib.util, sys
        spec = importlib.util.spec_from_file_location("tests_of_scoring", {__file__!r})
        tests = importlib.util.module_from_spec(spec)
        sys.modules["tests_of_scoring"] = tests
        spec.loader.exec_module(tests)

        async def main():
            made = tests.Scorer([tests.reward("Pid", timeout_s=0.1), tests.reward("Behaves", timeout_s=0.4)], (), 1)
            (sample,) = await made.score(tests.group("a"))
            task = asyncio.create_task(made.score(tests.group({text!r})))
            await asyncio.sleep(0.1)
            print(int(sample.rewards["pid"]), flush=True)
            await asyncio.sleep(60)

        if __name__ == "__main__":
            asyncio.run(main())
        """)
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
