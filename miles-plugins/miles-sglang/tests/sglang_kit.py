"""One server of SGLang for all tests of a session, and engines that share it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import torch

from miles_core.roles import Bucket, BucketLayout, EngineContext
from miles_core.sample import Completion, Request, Sampling
from miles_core.testing.models import engine_context, make_model, save_model, weights_of
from miles_sglang.engine import SglangEngine
from miles_sglang.options import EngineOptions
from miles_sglang.server import Server

INSTALLED = find_spec("sglang") is not None
REASON = "sglang is not installed: nox -s sglang"
MAX_TOKENS = 320


FLAGS = """
import argparse, json, multiprocessing
from sglang.srt.server_args import ServerArgs

WORDS = {{
    "int": "3", "float": "0.5", "human_readable_int": "2.5k", "loads": '{{"a": [1]}}', "json_list_type": '["a"]',
    "parse_cuda_graph_config_arg": '{{"decode": {{}}}}',
}}
parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)


def register():
    if multiprocessing.parent_process() is None:
        ServerArgs.add_cli_args(parser)
        found = {{name: read(action, name) for action in parser._actions for name in action.option_strings}}
        with open({path!r}, "w") as file:
            json.dump(found, file)


def read(action, name):
    word = next(map(str, filter(None, action.choices or ())), WORDS.get(getattr(action.type, "__name__", ""), "word"))
    words = [] if action.nargs == 0 else [word] * (2 if action.nargs in ("+", "*") else 1)
    value = getattr(parser.parse_args(["--model-path", "m", name, *words]), action.dest)
    return action.dest, words, value, type(action).__name__
"""
"""A plugin of SGLang's own: notes what its parser makes of each flag: the field, words, their value, and the kind."""


class SharedServer(Server):
    """A server that no engine starts or ends. flags: what `FLAGS` notes."""

    def __init__(self, folder: Path) -> None:
        save_model(make_model(), folder / "model")
        self.folder, self.flags = folder, folder / "flags.json"
        super().__init__({}, context_of(folder))

    async def start(self) -> None:
        """With the plugin."""
        site = self.folder / "site"
        info = site / "sglang_flags-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-flags\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nflags = sglang_flags:register\n")
        (site / "sglang_flags.py").write_text(FLAGS.format(path=str(self.flags)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
            await super().start()

    def let_go(self) -> None:
        """What the end of this process would do."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()

    @property
    def group(self) -> int:
        assert self._process is not None
        return self._process.pid

    def lent(self) -> Any:
        server = self

        class Lent:
            def __getattr__(self, name: str) -> Any:
                return getattr(server, name)

            async def start(self) -> None: ...

            def stop(self) -> None: ...

        return Lent()


def left_over(server: SharedServer, patience_s: float = 0) -> list[psutil.Process]:
    """Processes of the server's group that live, after waiting for there to be none."""
    end = time.monotonic() + patience_s
    while True:
        found = [process for process in psutil.process_iter() if _of_group(process, server.group)]
        if not found or time.monotonic() >= end:
            return found
        time.sleep(0.1)


def _of_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def context_of(folder: Path, gpus: int = 0, **changes: Any) -> EngineContext:
    context = engine_context(folder / "model", gpus, folder=folder, max_tokens=MAX_TOKENS, **changes)
    return replace(context, verify=True)


def borrower(server: SharedServer, context: EngineContext) -> SglangEngine:
    """An engine on the shared server."""
    engine = SglangEngine(EngineOptions(), context)
    engine.server = server.lent()
    return engine


def with_engine(server: SharedServer, use: Callable[[SglangEngine], Awaitable[Any]]) -> Any:
    """What `use` gives of an engine that has the weights of `make_model()` as version 0."""

    async def run() -> Any:
        engine = borrower(server, context_of(server.folder))
        await engine.start()
        try:
            await publish(engine, make_model(), 0)
            return await use(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


async def publish(engine: SglangEngine, model: Any, version: int, mode: Any = "abort") -> None:
    """Weights by `Engine.load`."""
    await engine.pause(mode)
    weights = weights_of(model)
    await asyncio.to_thread(engine.load, list(weights), list(weights.values()))
    engine.set_version(version)
    await engine.resume()


async def collect(engine: SglangEngine, requests: Sequence[Request]) -> dict[str, list[Completion]]:
    return {name: completions async for name, completions in engine.generate(requests)}


def ask(name: str, tokens: Sequence[int], seeds: Sequence[int] = (0,), **sampling: Any) -> Request:
    return Request(id=name, tokens=np.array(tokens, np.int32), sampling=Sampling(**sampling), seeds=tuple(seeds))


def buckets_of(model: Any) -> list[Bucket]:
    weights = list(weights_of(model).items())
    return [
        Bucket(
            names=tuple(name for name, _ in part),
            shapes=tuple(tuple(tensor.shape) for _, tensor in part),
            flat=torch.cat([tensor.reshape(-1) for _, tensor in part]),
        )
        for part in (weights[:1], weights[1:9], weights[9:])
    ]


def layout_of(buckets: Sequence[Bucket]) -> list[BucketLayout]:
    return [BucketLayout(names=bucket.names, shapes=bucket.shapes, dtype="float32") for bucket in buckets]
