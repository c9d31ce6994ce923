"""The engine on a real server with a tiny random model: what is asked, what comes back, and what happens meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from sglang_kit import (
    INSTALLED,
    MAX_TOKENS,
    REASON,
    SharedServer,
    ask,
    borrower,
    collect,
    context_of,
    publish,
    with_engine,
)

import miles_sglang
from miles_core.errors import UserError
from miles_core.plugins import Plugin
from miles_core.roles import EngineContext, Quotient
from miles_core.specs import EngineSpec
from miles_core.testing.kits import rules_of
from miles_core.testing.models import make_model, response_logprobs, save_model
from miles_core.testing.subject import SkippedError, Subject
from miles_sglang import engine as engine_module
from miles_sglang.engine import SglangEngine
from miles_sglang.options import EngineOptions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
(SPEC,) = miles_sglang.miles_engines()
PLUGIN = Plugin(name="miles-sglang", version="0", entry="miles_sglang", requires="", status="active", records=(SPEC,))


@pytest.mark.parametrize("rule", rules_of(EngineSpec), ids=lambda rule: rule.__name__)
def test_the_contract_holds(rule: Any, server: SharedServer) -> None:
    class OnServer(Subject[EngineSpec]):
        def make(self, context: EngineContext) -> SglangEngine:
            return borrower(server, context)

    with TemporaryDirectory() as folder:
        try:
            assert list(rule(OnServer(PLUGIN, SPEC, Path(folder)))) == []
        except SkippedError as reason:
            pytest.skip(str(reason))


def test_stop_tokens_and_stop_strings_end_a_response_and_stay_in_it(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> Any:
        free = (await collect(engine, [ask("free", [3, 1, 4], temperature=0.0, max_new_tokens=12)]))["free"][0]
        at = next(place for place in range(2, 12) if free.tokens[place] not in free.tokens[:place])
        token = int(free.tokens[at])
        requests = [
            ask("token", [3, 1, 4], temperature=0.0, max_new_tokens=12, stop_token_ids=(token,)),
            ask("string", [3, 1, 4], temperature=0.0, max_new_tokens=12, stop=(f" {token}",)),
        ]
        return free, at, await collect(engine, requests)

    free, at, answers = with_engine(server, use)
    for name in ("token", "string"):
        (completion,) = answers[name]
        assert completion.status == "completed", name
        assert len(completion.tokens) <= at + 1
        assert completion.tokens.tolist() == free.tokens[: len(completion.tokens)].tolist()
    assert len(answers["token"][0].tokens) == at + 1


def test_a_response_may_fill_what_the_prompt_leaves(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> Any:
        return await collect(engine, [ask("long", [5] * (MAX_TOKENS - 7), max_new_tokens=100)])

    (completion,) = with_engine(server, use)["long"]
    assert (len(completion.tokens), completion.status) == (7, "truncated")


def test_a_request_that_cannot_be_is_refused_before_it_is_sent(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> None:
        for request, error in (
            (ask("empty", []), "no prompt tokens"),
            (ask("none", [1], seeds=()), "no seeds"),
            (ask("long", [1] * MAX_TOKENS), "at most 319 fit. Raise model.max_tokens"),
            (ask("outside", [1, 61]), "tokens outside the model's vocabulary of 61"),
            (ask("negative", [-1, 2]), "tokens outside the model's vocabulary of 61"),
            (ask("stop", [1], stop=("",)), "an empty stop string"),
        ):
            with pytest.raises(UserError, match=error):
                engine.generate([request])

    with_engine(server, use)


def test_requests_that_enter_together_go_as_one_and_each_comes_back_when_it_is_finished(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> Any:
        asked, events = [], engine._events

        def counted(path: str, body: Any) -> Any:
            asked.append((path, len(body["rid"])))
            return events(path, body)

        engine._events = counted  # type: ignore[method-assign]
        requests = [ask(str(length), [7], (1, 2), temperature=0.0, max_new_tokens=length) for length in (120, 40, 2)]
        order = [name async for name, _ in engine.generate(requests)]
        return asked, order

    asked, order = with_engine(server, use)
    assert asked == [("generate", 6)]
    assert order == ["2", "40", "120"]


def test_a_request_that_waits_for_weights_can_be_aborted(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> Any:
        await engine.pause("drain")
        waiting = asyncio.create_task(collect(engine, [ask("late", [1, 2], seeds=(1, 2))]))
        await asyncio.sleep(0.05)
        await engine.abort(["late"])
        answers = await asyncio.wait_for(waiting, 10)
        await engine.resume()
        return answers

    answers = with_engine(server, use)
    assert [(completion.status, len(completion.tokens)) for completion in answers["late"]] == [("aborted", 0)] * 2


def test_ids_that_begin_alike_are_told_apart(server: SharedServer) -> None:
    """The server takes the id of an abort for the beginning of ids."""

    async def use(engine: SglangEngine) -> Any:
        requests = [ask(str(number), [1 + number], max_new_tokens=120) for number in range(12)]
        running = asyncio.create_task(collect(engine, requests))
        await asyncio.sleep(0.2)
        await engine.abort(["1"])
        return await running

    answers = with_engine(server, use)
    assert {name for name, (completion,) in answers.items() if completion.status == "aborted"} == {"1"}


@pytest.mark.parametrize("mode", ["retract", "in-place"])
def test_new_weights_never_meet_a_cache_of_old_ones(mode: Any, server: SharedServer) -> None:
    """What begins after a publish, and what was retracted for it, is computed with the new weights alone."""
    prompt = [7, 8, 9, 10, 11, 12]

    async def use(engine: SglangEngine) -> Any:
        await collect(engine, [ask("warm", prompt, max_new_tokens=4)])  # leaves the prompt in the cache
        running = asyncio.create_task(collect(engine, [ask("runs", prompt, max_new_tokens=200)]))
        await asyncio.sleep(0.2)
        await publish(engine, make_model(seed=1), 1, mode)
        later = await collect(engine, [ask("later", prompt, max_new_tokens=8)])
        return (await running)["runs"][0], later["later"][0]

    runs, later = with_engine(server, use)
    old, new = make_model(), make_model(seed=1)
    tokens = np.array(prompt, np.int32)
    np.testing.assert_allclose(later.logprobs, response_logprobs(new, tokens, later.tokens), atol=1e-4)
    assert set(later.versions.tolist()) == {1}
    at = int((runs.versions == 0).sum())
    assert 0 < at < 200
    assert runs.versions.tolist() == [0] * at + [1] * (200 - at)
    before = response_logprobs(old, tokens, runs.tokens)[:at]
    np.testing.assert_allclose(runs.logprobs[:at], before, atol=1e-4)
    after = np.abs(runs.logprobs[at:] - response_logprobs(new, tokens, runs.tokens)[at:].numpy())
    # Retracted: the new weights alone. In place: the new weights on a cache of the old.
    assert (after.max() < 1e-4) == (mode == "retract")


def test_sleep_waits_and_wake_goes_on(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> Any:
        running = asyncio.create_task(collect(engine, [ask("runs", [1, 2], max_new_tokens=20)]))
        await asyncio.sleep(0.05)
        await engine.sleep()
        waiting = asyncio.create_task(collect(engine, [ask("late", [1, 2], max_new_tokens=4)]))
        await asyncio.sleep(0.1)
        asleep = running.done(), waiting.done()
        await engine.wake()
        return asleep, await running, await waiting

    asleep, runs, late = with_engine(server, use)
    assert asleep == (True, False)
    assert len(runs["runs"][0].tokens) == 20
    completion = late["late"][0]
    expected = response_logprobs(make_model(), np.array([1, 2], np.int32), completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_only_the_time_with_something_to_do_is_busy(server: SharedServer) -> None:
    async def use(engine: SglangEngine) -> tuple[float, float, float]:
        before = engine.busy_seconds
        await collect(engine, [ask("runs", [1, 2], max_new_tokens=8)])
        after = engine.busy_seconds
        await asyncio.sleep(0.3)
        return before, after, engine.busy_seconds

    before, after, later = with_engine(server, use)
    assert before == 0
    assert 0 < after == later


def test_what_the_server_measures_is_told_once(server: SharedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "SAMPLE_S", 0.01)

    async def use(engine: SglangEngine) -> Any:
        await engine.measure()  # of what was before
        await collect(engine, [ask("one", range(1, 31), (1, 2, 3, 4), max_new_tokens=250)])
        await collect(engine, [ask("again", range(1, 31), max_new_tokens=5)])
        return await engine.measure(), await engine.measure()

    told, later = with_engine(server, use)
    assert (told["prompt_tokens"], told["retractions"]) == (150, 0)
    assert 29 <= told["cached_tokens"] <= 4 * 29  # the last token of a prompt is always computed
    assert told["cache_hit_rate"] == Quotient(told["cached_tokens"], 150)
    assert told["tokens_per_second"].part == 1005
    assert told["time_to_first_token_seconds"].whole == 5
    assert told["inter_token_seconds"].whole == 1000
    seconds = told["tokens_per_second"].whole
    assert 0 < told["inter_token_seconds"].part + told["time_to_first_token_seconds"].part <= 5 * seconds
    for name, most in (("running_requests", 4), ("kv_usage", 1)):
        assert 0 < told[name].part <= most * told[name].whole, name
    assert told["queued_requests"].part >= 0
    assert all((number.part if isinstance(number, Quotient) else number) == 0 for number in later.values())


@pytest.mark.skipif(not INSTALLED, reason=REASON)  # the options are checked against the installed server's
def test_without_the_servers_metrics_there_are_none(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path / "model")
    engine = SglangEngine(EngineOptions(server={"enable_metrics": False}), context_of(tmp_path))
    assert asyncio.run(engine.measure()) == {}
