"""The server's process: its arguments, its start, and what is heard of one that does not start."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from sglang_kit import REASON, ask, collect, context_of

from miles_core.errors import RunError, UserError
from miles_core.testing.models import make_model, save_model
from miles_sglang import server as module
from miles_sglang import surface
from miles_sglang.engine import SglangEngine
from miles_sglang.options import EngineOptions
from miles_sglang.server import Server, arguments
from miles_sglang.sync import ask as ask_server

FAKE = """
import http.server, json, os, sys
fields = json.loads(sys.stdin.readline())
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, answer):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())
    def do_GET(self):
        self.answer({"weight_version": fields["weight_version"]})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/generate":
            print("the scheduler hit an exception", flush=True)
            os._exit(9)
        if self.path == "/words":
            self.send_error(500, "out of words")
        else:
            self.answer([True])
http.server.ThreadingHTTPServer((fields["host"], fields["port"]), Handler).serve_forever()
"""
"""A server that dies when it is to generate."""


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Something else in the place of SGLang."""
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", script))
    monkeypatch.setattr(surface, "server_args", lambda: None)


def test_miles_sets_model_weights_lengths_and_place_and_the_run_file_the_rest(tmp_path: Path) -> None:
    fields = arguments({"max_running_requests": 7, "log_level": "debug"}, context_of(tmp_path, index=3))
    assert fields["model_path"] == str(tmp_path / "model")
    assert (fields["load_format"], fields["dtype"], fields["host"]) == ("dummy", "float32", "127.0.0.1")
    assert (fields["device"], fields["attention_backend"], fields["random_seed"]) == ("cpu", "torch_native", 3)
    assert (fields["max_running_requests"], fields["log_level"]) == (7, "debug")
    assert arguments({}, context_of(tmp_path, frozen=True))["load_format"] == "auto"


def test_with_gpus_the_server_takes_them_all_and_sglangs_own_defaults(tmp_path: Path) -> None:
    fields = arguments({}, context_of(tmp_path, gpus=2))
    assert fields["tp_size"] == 2
    assert not {"device", "attention_backend", "mem_fraction_static"} & fields.keys()


def test_a_server_whose_ranks_are_not_its_gpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "raise AssertionError")
    with pytest.raises(UserError, match=r"server\.tp_size is 4 and engine\.gpus 2: set engine\.gpus alone"):
        asyncio.run(Server({"tp_size": 4}, context_of(tmp_path, gpus=2)).start())


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "lower server.mem_fraction_static"),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "lower model.max_tokens"),
    ],
)
def test_with_too_little_memory_it_is_said_what_to_lower(
    said: str, mend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, f"import sys; print({said!r}); sys.exit(1)")
    with pytest.raises(RunError, match=rf"(?s){re.escape(said)}\n.*{mend}"):
        asyncio.run(Server({}, context_of(tmp_path)).start())


def test_a_server_that_dies_at_start_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "import sys; print('no such quantization: int3'); sys.exit(7)")
    server = Server({}, context_of(tmp_path))
    with pytest.raises(RunError, match=r"(?s)exit code 7 \(log: .*sglang-0.log\).*no such quantization: int3"):
        asyncio.run(server.start())


class Other(BaseHTTPRequestHandler):
    """Another program, which has an answer to everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"weight_version": "another"}')

    def log_message(self, *args: Any, **named: Any) -> None: ...


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which another program answers."""
    other = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    Thread(target=other.serve_forever).start()
    yield other.server_port
    other.shutdown()
    other.server_close()


def test_a_taken_port_is_left_for_another_whoever_answers_there(
    taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, FAKE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        ports = [taken, free.getsockname()[1]]
    monkeypatch.setattr(module, "_free_port", iter(ports).__next__)
    server = Server({}, context_of(tmp_path))
    try:
        asyncio.run(server.start())
        assert server.url == f"http://127.0.0.1:{ports[1]}"
        assert server.ended is None
    finally:
        server.stop()


def test_ports_that_are_all_taken_are_told_of(taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, FAKE)
    monkeypatch.setattr(module, "_free_port", lambda: taken)
    server = Server({}, context_of(tmp_path))
    with pytest.raises(RunError, match=r"(?s)exit code 1.*Address already in use"):
        asyncio.run(server.start())
    assert server.log.read_text().count("Address already in use") == module.ATTEMPTS


def test_a_server_that_dies_while_it_generates_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason=REASON)
    stand_in(monkeypatch, FAKE)
    save_model(make_model(), tmp_path / "model")

    async def run() -> None:
        engine = SglangEngine(EngineOptions(), context_of(tmp_path))
        await engine.start()
        try:
            engine.set_version(0)
            await engine.resume()
            await collect(engine, [ask("one", [1, 2]), ask("two", [1, 2])])
        finally:
            await engine.stop()

    with pytest.raises(RunError, match=r"(?s)exit code 9 \(log: .*the scheduler hit an exception"):
        asyncio.run(run())


def test_a_colocated_server_can_give_its_gpu_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = replace(context_of(tmp_path, gpus=1), sleeps=True)
    assert arguments({}, context)["enable_memory_saver"] is True
    assert "enable_memory_saver" not in arguments({}, context_of(tmp_path, gpus=1))
    assert "enable_memory_saver" not in arguments({}, replace(context_of(tmp_path), sleeps=True))  # no GPU
    stand_in(monkeypatch, "raise AssertionError")
    with pytest.raises(UserError, match=r"server\.enable_memory_saver is false: remove it, or set placement\.sleep"):
        asyncio.run(Server({"enable_memory_saver": False}, context).start())
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install torch_memory_saver, or set placement\.sleep = false"):
        asyncio.run(Server({}, context).start())


def test_a_server_that_dies_while_it_takes_weights_is_heard_and_so_is_one_that_answers_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, FAKE)
    told: list[str] = []
    server = Server({}, replace(context_of(tmp_path), lost=told.append))
    asyncio.run(server.start())
    try:
        with pytest.raises(RunError, match=r"(?s)weight sync: engine 0: /words: .*out of words.*\(log: "):
            ask_server(server, "words")
        assert told == []
        with pytest.raises(RunError, match=r"(?s)exit code 9 \(log: .*the scheduler hit an exception") as caught:
            ask_server(server, "generate")
        assert told == [str(caught.value)]
    finally:
        server.stop()


def test_a_server_that_ends_while_nobody_asks_for_anything_is_told_of_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason=REASON)
    stand_in(monkeypatch, FAKE)
    save_model(make_model(), tmp_path / "model")

    async def run() -> str:
        told: asyncio.Queue[str] = asyncio.Queue()
        engine = SglangEngine(EngineOptions(), replace(context_of(tmp_path), lost=told.put_nowait))
        await engine.start()
        try:
            assert told.empty()
            assert engine.server._process is not None
            os.kill(engine.server._process.pid, signal.SIGKILL)
            return await asyncio.wait_for(told.get(), 10)
        finally:
            await engine.stop()

    assert re.match(r"(?s)engine 0: the SGLang server ended with exit code -9 \(log: ", asyncio.run(run()))
