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


def test_what_the_server_refuses_of_a_batch_is_told_to_who_asked_for_it_and_the_rest_is_answered(
    tmp_path: Path,
) -> None:
    save_model(make_model(), tmp_path / "model")

    async def run() -> list[Any]:
        engine = SglangEngine(EngineOptions(), context_of(tmp_path))
        calls = [engine._call(ask(name, [1, 2])) for name in ("wrong", "busy", "fine", "lost")]

        async def events(path: str, body: Any) -> AsyncIterator[Any]:
            wrong, busy, fine, _ = body["rid"]
            refused = {"type": "abort", "message": "no"}
            yield {"meta_info": {"id": fine, "finish_reason": None}}
            yield {"meta_info": {"id": wrong, "finish_reason": {**refused, "status_code": 400}}}
            yield {"meta_info": {"id": busy, "finish_reason": {**refused, "status_code": 503}}}
            info = {"output_token_logprobs": [[-0.5, 7, None]], "weight_versions": [3], "cached_tokens": 2}
            yield {"output_ids": [7], "meta_info": {"id": fine, "finish_reason": {"type": "stop"}, **info}}

        engine._events = events  # type: ignore[method-assign, assignment]
        engine._open.set()
        await engine._run(calls)
        assert engine.counts == {"prompt_tokens": 0, "cached_tokens": 2, "retractions": 0}
        return await asyncio.gather(*(call.answer for call in calls), return_exceptions=True)

    wrong, busy, (name, (completion,)), lost = asyncio.run(run())
    assert [type(wrong), type(busy), type(lost)] == [UserError, RunError, RunError]
    assert "refuses a request: no" in str(wrong)
    assert "no answer of SGLang any more" in str(lost)
    assert (name, completion.tokens.tolist(), completion.versions.tolist()) == ("fine", [7], [3])


def test_lines_are_put_together_from_whatever_pieces_arrive() -> None:
    async def run() -> list[bytes]:
        async def pieces() -> AsyncIterator[bytes]:
            for piece in (b"da", b"ta: 1\n\nda", b"", b"ta: 2\n"):
                yield piece

        return [line async for line in _lines(pieces())]

    assert asyncio.run(run()) == [b"data: 1", b"", b"data: 2"]
