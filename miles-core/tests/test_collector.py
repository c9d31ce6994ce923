"""The collector: what it admits, what it hands over, and that nothing is lost, trained twice or too stale."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import numpy as np
import pytest
from collector_kit import Bench, Scores, groups_of, plan, replaced
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_core.errors import RunError, UserError
from miles_core.run.collector import DROP_LIMIT, Collected
from miles_core.sample import Group


@pytest.fixture(autouse=True, scope="module")
def _replaced() -> Iterator[None]:
    with replaced():
        yield


orders = st.integers(0, 2**32 - 1).map(random.Random)
"""Sources of finish orders."""


async def whole_run(bench: Bench, order: random.Random, *, lazy: bool = True) -> list[Collected]:
    """All batches of a run, with things finishing during the training of each too; the engines' version follows."""
    schedule = bench.plan.stages[0].schedule
    await bench.begin()
    batches = []
    for step in range(schedule.steps):
        batches.append(await bench.batch(step, order.choice))
        for _ in range(order.randrange(4) if lazy else 0):  # meanwhile the trainer works
            if bench.engines.waiting:
                bench.engines.finish(order.choice(sorted(bench.engines.waiting)))
                await bench.settle()
        bench.engines.version = step + 1
    return batches


@settings(deadline=None, max_examples=60)
@given(
    order=orders,
    batch=st.integers(1, 4),
    steps=st.integers(1, 6),
    staleness=st.integers(0, 4),
    equal=st.sets(st.integers(0, 25), max_size=12),
)
def test_whatever_finishes_when_nothing_is_stale_lost_or_trained_twice(
    order: random.Random, batch: int, steps: int, staleness: int, equal: set[int]
) -> None:
    bench = Bench(plan(batch=batch, steps=steps, staleness=staleness, filtered=True), Scores(equal=equal))
    trained: list[int] = []

    def admitted() -> None:
        """What is used up, buffered and under way never exceeds its bound; what was dropped does not count."""
        asked, waiting = bench.engines.asked, bench.engines.waiting
        dropped = [group for group in asked if group in equal and group not in waiting]
        version = bench.collector.progress.version
        assert len(asked) - len(dropped) <= batch * min(version + staleness + 1, steps)

    bench.engines.on_ask = admitted
    batches = asyncio.run(whole_run(bench, order))
    for step, collected in enumerate(batches):
        assert collected.batch is not None
        made = collected.batch["versions"][collected.batch["mask"]]
        assert step - staleness <= made.min()
        assert made.max() <= step
        assert len(groups_of(collected)) == batch
        trained += groups_of(collected)
    assert len(trained) == len(set(trained)) == batch * steps
    dropped = sorted(equal & set(bench.engines.asked))
    assert sorted([*trained, *dropped]) == sorted(bench.engines.asked) == list(range(len(bench.engines.asked)))
    assert sum(collected.metrics["dropped"] for collected in batches) == len(dropped)
    assert not bench.engines.waiting


@settings(deadline=None, max_examples=30)
@given(first=orders, second=orders, equal=st.sets(st.integers(0, 15), max_size=8))
def test_a_synchronous_run_gives_the_same_batches_in_whatever_order_things_finish(
    first: random.Random, second: random.Random, equal: set[int]
) -> None:
    made = plan(batch=3, steps=3, filtered=True)
    one, other = (asyncio.run(whole_run(Bench(made, Scores(equal=equal)), order)) for order in (first, second))
    for left, right in zip(one, other, strict=True):
        assert left.batch is not None
        assert right.batch is not None
        assert groups_of(left) == groups_of(right)
        for name in left.batch.columns:
            np.testing.assert_array_equal(left.batch[name], right.batch[name])


def test_a_synchronous_run_replaces_what_was_dropped_only_when_the_whole_wave_is_scored() -> None:
    async def run() -> None:
        bench = Bench(plan(batch=3, steps=1, filtered=True), Scores(equal={0, 2}))
        await bench.begin()
        waiting = asyncio.create_task(bench.collector.next_batch(0, 30.0))
        await bench.settle()
        assert bench.engines.asked == [0, 1, 2]
        for group in (0, 2):
            bench.engines.finish(group)
            await bench.settle()
            assert bench.engines.asked == [0, 1, 2]
        bench.engines.finish(1)
        await bench.settle()
        assert bench.engines.asked == [0, 1, 2, 3, 4]
        for group in (4, 3):
            bench.engines.finish(group)
        collected = await waiting
        assert collected is not None
        assert groups_of(collected) == [1, 3, 4]
        assert collected.metrics["dropped"] == 2

    asyncio.run(run())


def test_a_batch_that_is_there_already_makes_room_for_the_next_one_to_be_generated_meanwhile() -> None:
    async def run() -> None:
        bench = Bench(plan(batch=2, steps=4, staleness=1))
        await bench.begin()
        await bench.batch(0, min)
        for group in sorted(bench.engines.waiting):
            bench.engines.finish(group)
        await bench.settle()
        assert await bench.collector.next_batch(1, 30.0) is not None
        await bench.settle()
        assert bench.engines.asked == [0, 1, 2, 3, 4, 5]

    asyncio.run(run())


@pytest.mark.parametrize(("staleness", "begun"), [(0, 2), (1, 4), (3, 8), (9, 12)])
def test_as_many_groups_are_begun_as_may_be_stale_and_no_more_than_the_stage_needs(staleness: int, begun: int) -> None:
    async def run() -> None:
        bench = Bench(plan(batch=2, steps=6, staleness=staleness))
        await bench.begin()
        assert await bench.collector.next_batch(0, 0.01) is None
        assert len(bench.engines.asked) == begun

    asyncio.run(run())


def test_what_the_engines_have_measured_is_known_when_the_batch_is_finished() -> None:
    async def run() -> None:
        bench = Bench(plan(batch=2, steps=2))
        await bench.begin()
        assert await bench.collector.measured() == {}  # there was no batch
        for step, measures in enumerate(({"cached_tokens": 5.0}, {})):
            bench.engines.measures = measures
            await bench.batch(step, min)
            assert await bench.collector.measured() == {f"engine/{name}": number for name, number in measures.items()}

    asyncio.run(run())


def test_an_old_group_is_waited_for_although_newer_ones_would_fill_the_batch() -> None:
    async def run() -> None:
        bench = Bench(plan(batch=2, steps=4, staleness=1))
        await bench.begin()
        assert groups_of(await bench.batch(0, max)) == [2, 3]  # 0 and 1 may wait for the next batch
        bench.engines.version = 1
        waiting = asyncio.create_task(bench.collector.next_batch(1, 30.0))
        await bench.settle()
        assert sorted(bench.engines.waiting) == [0, 1, 4, 5]
        for group in (4, 5):
            bench.engines.finish(group)
        await bench.settle()
        assert not waiting.done()
        for group in (0, 1):
            bench.engines.finish(group)
        collected = await waiting
        assert collected is not None
        assert groups_of(collected) == [0, 1]
        assert collected.metrics["staleness/max"] == 1

    asyncio.run(run())


def test_filters_that_drop_everything_end_the_run() -> None:
    async def run() -> None:
        bench = Bench(plan(batch=2, steps=1, filtered=True), Scores(equal=range(10_000)))
        await bench.begin()
        await bench.batch(0, min)

    with pytest.raises(RunError, match=rf"\(nonzero-std\) have dropped {DROP_LIMIT * 2 + 1} groups since"):
        asyncio.run(run())


def test_filters_that_drop_almost_everything_end_the_run_too() -> None:
    """A group that is kept now and then does not make the refilling endless."""

    async def run() -> None:
        bench = Bench(plan(batch=3, steps=1, filtered=True), Scores(equal=set(range(10_000)) - {1, 80}))
        await bench.begin()
        await bench.batch(0, min)

    with pytest.raises(RunError, match=rf"have dropped {DROP_LIMIT * 3 + 1} groups since the last batch of 3"):
        asyncio.run(run())


def test_what_is_dropped_for_one_batch_does_not_count_for_the_next() -> None:
    async def run() -> None:
        kept = {80, 81, 172, 173}
        bench = Bench(plan(batch=2, steps=2, filtered=True), Scores(equal=set(range(10_000)) - kept))
        await bench.begin()
        assert (await bench.batch(0, min)).metrics["dropped"] == 80
        bench.engines.version = 1
        assert (await bench.batch(1, min)).metrics["dropped"] == 90

    asyncio.run(run())


def test_rewards_that_always_fail_end_the_run_with_their_traceback() -> None:
    async def run() -> None:
        bench = Bench(plan(batch=3, steps=1), Scores(failed=range(100)))
        await bench.begin()
        await bench.batch(0, min)

    message = "every sample of 3 groups in a row failed to be scored, the last one with: toy: ValueError: no"
    with pytest.raises(RunError, match=message) as caught:
        asyncio.run(run())
    assert caught.value.cause == "Traceback of the reward"


def test_rewards_that_fail_now_and_then_are_counted_and_do_not_end_the_run() -> None:
    async def run() -> None:
        bench = Bench(plan(batch=3, steps=2), Scores(failed={1, 2, 4}))
        await bench.begin()
        first = await bench.batch(0, min)
        assert groups_of(first) == [0, 1, 2]
        assert first.metrics["failed"] == 4  # samples, two of each group
        assert first.batch is not None
        assert first.batch.samples["scored"].tolist() == [True, True, False, False, False, False]
        assert (await bench.batch(1, min)).metrics["failed"] == 2

    asyncio.run(run())


@pytest.mark.parametrize("error", [RunError("engine 0 died"), UserError("the prompt is too long")])
def test_what_a_rollout_raises_reaches_whoever_waits_for_the_batch(error: Exception) -> None:
    async def run() -> None:
        bench = Bench(plan())
        await bench.begin()
        waiting = asyncio.create_task(bench.collector.next_batch(0, 30.0))
        await bench.settle()
        bench.engines.waiting[1].set_exception(error)
        await waiting

    with pytest.raises(type(error), match=str(error)):
        asyncio.run(run())


def test_a_cancelled_rollout_is_not_waited_for_in_vain() -> None:
    async def run() -> None:
        bench = Bench(plan())
        await bench.begin()
        waiting = asyncio.create_task(bench.collector.next_batch(0, 5.0))
        await bench.settle()
        bench.engines.waiting[1].cancel()
        await bench.settle()
        assert waiting.done()

    asyncio.run(run())


def test_a_rollout_that_waits_for_nothing_of_ours_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        bench = Bench(plan(deadline_s=0.05))
        await bench.begin()

        async def stuck(*_: object) -> None:
            await asyncio.sleep(60)

        monkeypatch.setattr(bench.collector.producer.rollout, "run", stuck)
        assert await bench.collector.next_batch(0, 0.01) is None  # not late yet
        await bench.collector.next_batch(0, 0.1)

    with pytest.raises(RunError, match=r"single-turn has asked neither .* for 0.05 s .*these prompts: 0, 1"):
        asyncio.run(run())


def test_an_engine_that_takes_its_time_is_not_the_rollouts_fault() -> None:
    async def run() -> None:
        bench = Bench(plan(deadline_s=0.02))
        await bench.begin()
        assert await bench.collector.next_batch(0, 0.1) is None

    asyncio.run(run())


@settings(deadline=None, max_examples=30)
@given(order=orders, staleness=st.integers(0, 3), stop=st.integers(1, 4), busy=st.integers(0, 6))
def test_a_resumed_run_trains_on_every_prompt_that_the_stopped_one_had_not_trained_on(
    tmp_path_factory: pytest.TempPathFactory, order: random.Random, staleness: int, stop: int, busy: int
) -> None:
    made = plan(batch=2, steps=5, staleness=staleness)
    folder = tmp_path_factory.mktemp("checkpoint")
    trained: list[int] = []

    async def until_the_stop() -> Bench:
        bench = Bench(made)
        await bench.begin()
        for step in range(stop):
            trained.extend(groups_of(await bench.batch(step, order.choice)))
            bench.engines.version = step + 1
        for _ in range(min(busy, len(bench.engines.waiting))):  # these are scored and wait in the buffer
            bench.engines.finish(order.choice(sorted(bench.engines.waiting)))
            await bench.settle()
        bench.collector.save(folder)
        return bench

    async def after_it(old: Bench) -> None:
        bench = Bench(made)
        await bench.begin(stop, folder)
        assert _described(bench) == _described(old)
        for step in range(stop, 5):
            collected = await bench.batch(step, order.choice)
            trained.extend(groups_of(collected))
            assert collected.metrics["staleness/max"] <= staleness
            bench.engines.version = step + 1

    asyncio.run(after_it(asyncio.run(until_the_stop())))
    assert sorted(trained) == list(range(10))


def _described(bench: Bench) -> dict[int, object]:
    """The buffer in plain values."""
    progress = bench.collector.progress

    def plain(value: object) -> object:
        return (value.dtype.str, value.tolist()) if isinstance(value, np.ndarray) else value

    return {
        group: (
            progress.begun[group],
            [{name: plain(value) for name, value in vars(sample).items()} for sample in done],
        )
        for group, done in sorted(progress.done.items())
    }


# ---- More groups than are needed -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    order=orders,
    batch=st.integers(1, 4),
    steps=st.integers(1, 5),
    staleness=st.integers(0, 2),
    over_sample=st.integers(1, 5),
    equal=st.sets(st.integers(0, 25), max_size=12),
)
def test_of_too_many_groups_none_is_lost_stale_or_trained_twice(
    order: random.Random, batch: int, steps: int, staleness: int, over_sample: int, equal: set[int]
) -> None:
    made = plan(batch=batch, steps=steps, staleness=staleness, over_sample=over_sample, filtered=True)
    bench = Bench(made, Scores(equal=equal))
    trained: list[int] = []

    def admitted() -> None:
        progress = bench.collector.progress
        assert len(progress.begun) <= batch * (staleness + 1) + over_sample

    bench.engines.on_ask = admitted
    batches = asyncio.run(whole_run(bench, order))
    for step, collected in enumerate(batches):
        assert collected.batch is not None
        assert step - staleness <= collected.batch["versions"][collected.batch["mask"]].min()
        assert len(groups_of(collected)) == batch
        trained += groups_of(collected)
    assert len(trained) == len(set(trained)) == batch * steps
    progress = bench.collector.progress
    asked = set(bench.engines.asked)
    dropped = asked & equal - set(progress.again) - set(progress.begun)
    assert asked == set(range(progress.position))
    assert sorted([*trained, *dropped, *progress.again, *progress.begun]) == sorted(asked)
    counted = progress.dropped + sum(collected.metrics["dropped"] for collected in batches)
    assert counted == len(dropped)
    # Whatever was asked for more often than once was thrown back each time but the last.
    thrown = sum(collected.metrics["oversampled"] for collected in batches)
    assert thrown == len(bench.engines.asked) - len(asked) + len(set(progress.again))


def test_the_first_groups_that_are_done_make_the_batch_and_the_rest_is_drawn_again() -> None:
    async def run() -> None:
        bench = Bench(plan(batch=2, steps=2, over_sample=2))
        await bench.begin()
        waiting = asyncio.create_task(bench.collector.next_batch(0, 30.0))
        await bench.settle()
        assert bench.engines.asked == [0, 1, 2, 3]
        for group in (3, 1):
            bench.engines.finish(group)
            await bench.settle()
        collected = await waiting
        assert collected is not None
        assert groups_of(collected) == [1, 3]
        assert collected.metrics["oversampled"] == 2
        await bench.settle()
        assert sorted(bench.engines.left) == [0, 2]
        assert bench.engines.asked == [0, 1, 2, 3]  # while the trainer works, nothing is begun that would be stale
        bench.engines.version = 1
        assert groups_of(await bench.batch(1, min)) == [0, 2]
        assert bench.engines.asked[4:] == [0, 2, 4, 5]

    asyncio.run(run())


def test_of_more_done_than_needed_those_that_were_done_first_make_the_batch() -> None:
    async def run() -> None:
        bench = Bench(plan(batch=2, steps=1, over_sample=2))
        await bench.begin()
        waiting = asyncio.create_task(bench.collector.next_batch(0, 30.0))
        await bench.settle()
        for group in (2, 3, 0):
            bench.engines.finish(group)
        collected = await waiting
        assert collected is not None
        assert groups_of(collected) == [2, 3]
        assert collected.metrics["oversampled"] == 2

    asyncio.run(run())


def test_a_group_that_is_being_scored_is_not_disturbed_and_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        bench = Bench(plan(batch=1, steps=2, over_sample=1))
        scored = asyncio.Event()
        score = bench.scores.score

        async def slow(group: Group) -> Group:
            if group[0].group == 0 and not scored.is_set():
                await scored.wait()
                return await Scores(failed={0}).score(group)
            return await score(group)

        monkeypatch.setattr(bench.scores, "score", slow)
        await bench.begin()
        waiting = asyncio.create_task(bench.collector.next_batch(0, 30.0))
        await bench.settle()
        for group in (0, 1):
            bench.engines.finish(group)
        first = await waiting
        assert first is not None
        assert groups_of(first) == [1]
        bench.engines.version = 1
        waiting = asyncio.create_task(bench.collector.next_batch(1, 30.0))
        await bench.settle()
        scored.set()  # the first attempt at group 0 is scored now, and nobody waits for it
        await bench.settle()
        assert not waiting.done()
        bench.engines.finish(0)
        second = await waiting
        assert second is not None
        assert groups_of(second) == [0]
        assert second.metrics["failed"] == 0
        assert second.batch is not None
        assert second.batch.samples["scored"].all()

    asyncio.run(run())


@settings(deadline=None, max_examples=30)
@given(order=orders, staleness=st.integers(0, 2), over_sample=st.integers(1, 4), stop=st.integers(1, 4))
def test_a_resumed_run_with_too_many_groups_loses_none(
    tmp_path_factory: pytest.TempPathFactory, order: random.Random, staleness: int, over_sample: int, stop: int
) -> None:
    made = plan(batch=2, steps=5, staleness=staleness, over_sample=over_sample)
    folder = tmp_path_factory.mktemp("checkpoint")
    trained: list[int] = []

    async def train(bench: Bench, steps: range) -> None:
        for step in steps:
            collected = await bench.batch(step, order.choice)
            trained.extend(groups_of(collected))
            assert collected.metrics["staleness/max"] <= staleness
            bench.engines.version = step + 1

    async def until_the_stop() -> None:
        bench = Bench(made)
        await bench.begin()
        await train(bench, range(stop))
        if bench.engines.waiting:
            bench.engines.finish(order.choice(sorted(bench.engines.waiting)))
            await bench.settle()
        bench.collector.save(folder)

    async def after_it() -> Bench:
        bench = Bench(made)
        await bench.begin(stop, folder)
        await train(bench, range(stop, 5))
        return bench

    asyncio.run(until_the_stop())
    progress = asyncio.run(after_it()).collector.progress
    assert len(trained) == len(set(trained)) == 10
    assert sorted([*trained, *progress.again, *progress.begun]) == list(range(progress.position))
