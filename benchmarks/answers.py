"""What the engine `sglang` spends on a server's answers, without a server: processor milliseconds per 1000 tokens.

256 answers of 256 tokens come as the server sends them, in pieces of 64 KiB. What is timed: taking them apart, making
arrays of them, and packing and unpacking these as Ray does on their way to the collector. In an environment with the
extra `engine` of miles-sglang, or that of `nox -s sglang`:

    python benchmarks/answers.py [--rounds 10]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import pickle
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray import cloudpickle

from miles_core.extras import import_extra
from miles_core.roles import EngineContext
from miles_core.sample import Request, Sampling
from miles_sglang.engine import SglangEngine
from miles_sglang.options import EngineOptions
from miles_sglang.tagging import INFO

REQUESTS, SEEDS, TOKENS, PIECE = 32, 8, 256, 2**16


def stream(ids: Sequence[str], orjson: Any) -> bytes:
    """What a server would send: the first token of each, later all of them."""
    draw = random.Random(0)
    firsts: list[bytes] = []
    lasts: list[bytes] = []
    for rid in ids:
        tokens = [draw.randrange(150_000) for _ in range(TOKENS)]
        logprobs = [[float(np.float32(draw.gauss(-2, 1))), token, None] for token in tokens]
        for events, count, reason in ((firsts, 1, None), (lasts, TOKENS, {"type": "length", "length": TOKENS})):
            info: dict[str, Any] = {"id": rid, "finish_reason": reason, "prompt_tokens": 20, "completion_tokens": count}
            info |= {"output_token_logprobs": logprobs[:count], INFO: [1] * count}
            event = {"text": "word " * count, "output_ids": tokens[:count], "meta_info": info}
            events.append(b"data: " + orjson.dumps(event) + b"\n\n")
    return b"".join([*firsts, *lasts, b"data: [DONE]\n\n"])


async def measure(folder: Path) -> dict[str, float]:
    """Seconds of one round, by what they were spent on."""
    orjson = import_extra("orjson", needed_by="this benchmark", install="miles-sglang[engine]")
    context = EngineContext(
        model=folder, index=0, gpus=0, threads=1, dtype="float32", max_tokens=1024, seed=0, folder=folder
    )
    engine, began = SglangEngine(EngineOptions(), context), 0.0

    @contextlib.asynccontextmanager
    async def answer(path: str, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        nonlocal began
        sent = stream(body["rid"], orjson)

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(sent), PIECE):
                yield sent[start : start + PIECE]

        began = time.process_time()
        yield SimpleNamespace(content=SimpleNamespace(iter_any=pieces))

    engine._orjson, engine._answer = orjson, answer  # type: ignore[method-assign]
    engine._open.set()
    sampling, prompt = Sampling(max_new_tokens=TOKENS), np.arange(20, dtype=np.int32)
    requests = [
        Request(id=str(number), tokens=prompt, sampling=sampling, seeds=tuple(range(SEEDS)))
        for number in range(REQUESTS)
    ]
    answers = [finished async for finished in engine.generate(requests)]
    assert sum(len(one.tokens) for _, found in answers for one in found) == REQUESTS * SEEDS * TOKENS
    taken = time.process_time()
    buffers: list[Any] = []
    packed = cloudpickle.dumps(answers, protocol=5, buffer_callback=buffers.append)
    sent = time.process_time()
    pickle.loads(packed, buffers=buffers)
    return {"take": taken - began, "pack": sent - taken, "unpack": time.process_time() - sent}


def main() -> None:
    """See the head of the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    found: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps({"vocab_size": 151_936}))
        for _ in range(rounds):
            for what, seconds in asyncio.run(measure(Path(name))).items():
                found[what].append(seconds / (REQUESTS * SEEDS * TOKENS) * 1e6)
    for what, spent in found.items():
        print(f"{what}: median {statistics.median(spent):.3f} ms, {min(spent):.3f} to {max(spent):.3f}")


if __name__ == "__main__":
    main()
