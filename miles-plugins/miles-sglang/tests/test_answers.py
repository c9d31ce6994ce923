"""What the engine makes of a server's answers, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from sglang_kit import ask, context_of

from miles_core.errors import RunError, UserError
from miles_core.testing.models import make_model, save_model
from miles_sglang.engine import SglangEngine, _lines
from miles_sglang.options import EngineOptions

REFUSED = {"type": "abort", "message": "no"}


def test_what_the_server_refuses_of_a_batch_is_told_to_who_asked_for_it_and_the_rest_is_answered(
    tmp_path: Path,
) -> None:
    save_model(make_model(), tmp_path / "model")

    async def run() -> list[Any]:
        engine = SglangEngine(EngineOptions(), context_of(tmp_path))
        calls = [engine._call(ask(name, [1, 2])) for name in ("wrong", "busy", "fine", "lost")]

        async def events(path: str, body: Any) -> AsyncIterator[Any]:
            wrong, busy, fine, _ = body["rid"]
            yield {"meta_info": {"id": fine, "finish_reason": None}}
            yield {"meta_info": {"id": wrong, "finish_reason": {**REFUSED, "status_code": 400}}}
            yield {"meta_info": {"id": busy, "finish_reason": {**REFUSED, "status_code": 503}}}
            info = {"output_token_logprobs": [[-0.5, 7, None]], "weight_versions": [3]}
            yield {"output_ids": [7], "meta_info": {"id": fine, "finish_reason": {"type": "stop"}, **info}}

        engine._events = events  # type: ignore[method-assign, assignment]
        engine._open.set()
        await engine._run(calls)
        return await asyncio.gather(*(call.answer for call in calls), return_exceptions=True)

    wrong, busy, (name, (completion,)), lost = asyncio.run(run())
    assert [type(wrong), type(busy), type(lost)] == [UserError, RunError, RunError]
    assert "refuses a request: no" in str(wrong)
    assert "no answer of SGLang any more" in str(lost)
    assert (name, completion.tokens.tolist(), completion.versions.tolist()) == ("fine", [7], [3])


def test_when_a_part_of_a_request_is_refused_its_other_parts_are_ended_and_nobody_elses(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path / "model")

    async def run() -> list[Any]:
        engine = SglangEngine(EngineOptions(), context_of(tmp_path))
        calls = [engine._call(ask("wrong", [1, 2], seeds=(1, 2, 3))), engine._call(ask("fine", [1, 2]))]
        (refused, *others), told = calls[0].ids, asyncio.Event()
        ended: list[str] = []

        async def post(path: str, body: Any) -> None:
            assert path == "abort_request"
            ended.append(body["rid"])
            if len(ended) == 2:
                told.set()

        async def events(path: str, body: Any) -> AsyncIterator[Any]:
            yield {"meta_info": {"id": refused, "finish_reason": {**REFUSED, "status_code": 400}}}
            await told.wait()
            for rid, reason in ((others[0], "abort"), (others[1], "abort"), (*calls[1].ids, "stop")):
                yield {"output_ids": [], "meta_info": {"id": rid, "finish_reason": {"type": reason}}}

        engine._events = events  # type: ignore[method-assign, assignment]
        engine._post = post  # type: ignore[method-assign, assignment]
        engine._open.set()
        await engine._run(calls)
        await asyncio.gather(*engine._tasks)  # it does not insist for ever
        assert sorted(ended) == sorted(others)
        return await asyncio.gather(*(call.answer for call in calls), return_exceptions=True)

    wrong, (name, (completion,)) = asyncio.run(run())
    assert isinstance(wrong, UserError)
    assert (name, completion.status) == ("fine", "completed")


def test_lines_are_put_together_from_whatever_pieces_arrive() -> None:
    async def run() -> list[bytes]:
        async def pieces() -> AsyncIterator[bytes]:
            for piece in (b"da", b"ta: 1\n\nda", b"", b"ta: 2\n"):
                yield piece

        return [line async for line in _lines(pieces())]

    assert asyncio.run(run()) == [b"data: 1", b"", b"data: 2"]
