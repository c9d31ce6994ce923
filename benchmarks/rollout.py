"""Tokens per second of the engine `sglang` as a run reaches it, and of bare `sglang.Engine.generate`, on one GPU.

Random weights of the shape of Qwen3-0.6B in bfloat16, 256 prompts of 64 tokens, exactly 256 new tokens each,
temperature 1. Miles: the pool of a run's collector, Ray, the engine's actor, the server by HTTP; no rewards and no
trainer. It always asks for log-probabilities, which the bare engine is asked for in every other round. Both are there
at once, with the same options, and take turns; what counts is the median of the ratios of neighbouring rounds.

    python benchmarks/rollout.py [--rounds 5] [--cpu-tiny]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from publish import SHAPE, TINY

from miles_core.cluster.engine_pool import EnginePool
from miles_core.cluster.members import EngineMember
from miles_core.cluster.session import Place, Session
from miles_core.config.layers import open_catalog
from miles_core.run.plan import make_plan
from miles_core.run.tokenizers import make_tokenizer
from miles_core.sample import Sampling
from miles_sglang import cpu

cpu.install()  # in the bare engine's processes too, which import this file first; it does nothing without --cpu-tiny

RUN = """
name = "rollout"
folder = {folder}
[model]
path = {model}
max_tokens = {length}
dtype = {dtype}
[engine]
name = "sglang"
gpus = {gpus}
[engine.server]
{server}
[sampling]
max_new_tokens = 1
[trainer]
name = "torch"
[data]
name = "jsonl"
path = {prompts}
[reward]
name = "exact"
[advantage]
name = "grpo"
[loss]
name = "grpo"
[schedule]
steps = 1
prompts_per_step = 1
samples_per_prompt = 2
"""
ON_GPU = {
    "mem_fraction_static": 0.35,
    "disable_prefill_cuda_graph": True,
    "cuda_graph_bs_decode": [1, 64, 128, 192, 256],
}
"""Few graphs: what starts soonest, with those that 256 sequences of one length use."""
ON_CPU = {"max_total_tokens": 4096, "max_running_requests": 64}


class Server(EngineMember):
    """A run's engine, whose weights nobody publishes: they are random anyway."""

    async def ready(self) -> None:
        """Generates from now on."""
        self.engine.set_version(0)
        await self.engine.resume()


class Work:
    """What is generated. prompts: [prompts, tokens]."""

    def __init__(self, *, tiny: bool) -> None:
        count, length, self.new = (8, 8, 16) if tiny else (256, 64, 256)
        self.prompts = np.random.default_rng(0).integers(0, 256, (count, length)).astype(np.int32)
        self.max_tokens = length + self.new

    @property
    def tokens(self) -> int:
        """How many are new."""
        return len(self.prompts) * self.new


def bare(folder: str, options: dict[str, Any], work: Work, pipe: Any) -> None:
    """The process of the bare engine."""
    import sglang

    engine = sglang.Engine(
        model_path=folder,
        load_format="dummy",
        context_length=work.max_tokens + 2,
        random_seed=0,
        **options,
    )
    prompts = work.prompts.tolist()
    sampling = {"temperature": 1.0, "max_new_tokens": work.new, "ignore_eos": True}
    pipe.send("ready")
    while (logprobs := pipe.recv()) is not None:
        started = time.perf_counter()
        answers = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=logprobs)
        seconds = time.perf_counter() - started
        assert [len(answer["output_ids"]) for answer in answers] == [work.new] * len(prompts)
        pipe.send(seconds)
    engine.shutdown()


async def through_miles(pool: EnginePool, work: Work) -> float:
    """Seconds of a round."""
    sampling = Sampling(temperature=1.0, max_new_tokens=work.new)
    started = time.perf_counter()
    answers = await asyncio.gather(*(pool.generate(prompt, [0], sampling) for prompt in work.prompts))
    seconds = time.perf_counter() - started
    assert [len(completion.tokens) for (completion,) in answers] == [work.new] * len(work.prompts)
    return seconds


async def compare(session: Session, folder: Path, plan: Any, work: Work, pipe: Any, rounds: int) -> None:
    """Starts Miles' side, then lets the sides take turns."""
    member = session.spawn(Server, "engine 0", plan, 0, folder)
    for method in ("enter", "start", "ready"):
        await session.ask(member, method)
    pool = EnginePool([(member.name, member.actor, member.log)], 300)
    seconds: dict[str, list[float]] = {"miles": [], "bare, with log-probabilities": [], "bare": []}
    for _ in range(rounds + 1):
        for name, taken in seconds.items():
            if name == "miles":
                taken.append(await through_miles(pool, work))
            else:
                pipe.send(name != "bare")
                taken.append(await asyncio.to_thread(pipe.recv))
    print(f"{'':30} {'tokens/s':>9} {'best':>9} {'miles over it':>14}")
    for name, taken in seconds.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(taken[1:], seconds["miles"][1:], strict=True))
        median, best = work.tokens / statistics.median(taken[1:]), work.tokens / min(taken[1:])
        print(f"{name:30} {median:9.0f} {best:9.0f} {ratio:14.3f}")


def plan_of(folder: Path, work: Work, options: dict[str, Any], gpus: int) -> Any:
    """The plan of a run with this engine; its data are never read."""
    file, prompts = folder / "rollout.toml", folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "", "answer": ""}\n')
    file.write_text(
        RUN.format(
            folder=json.dumps(str(folder)),
            model=json.dumps(str(folder)),
            prompts=json.dumps(str(prompts)),
            length=work.max_tokens,
            dtype=json.dumps("bfloat16" if gpus else "float32"),
            gpus=gpus,
            server="\n".join(f"{name} = {json.dumps(value)}" for name, value in options.items()),
        )
    )
    return make_plan(str(file), (), open_catalog(str(file), ()))


async def both(session: Session, folder: Path, plan: Any, work: Work, pipe: Any, rounds: int) -> None:
    """Miles' side, and its end."""
    try:
        await compare(session, folder, plan, work, pipe, rounds)
    finally:
        await session.stop()


def main() -> None:
    """See the head of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-tiny", action="store_true", help="a tiny model on the CPU: only to see that it runs")
    arguments = parser.parse_args()
    tiny, work = arguments.cpu_tiny, Work(tiny=arguments.cpu_tiny)
    options: dict[str, Any] = {"skip_tokenizer_init": True, **(ON_CPU if tiny else ON_GPU)}
    beside: dict[str, Any] = {**options, "dtype": "bfloat16"}
    if tiny:
        from miles_sglang.server import _WITHOUT_GPU

        os.environ |= cpu.ENVIRONMENT
        beside = {**_WITHOUT_GPU, **options, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({**SHAPE, **(TINY if tiny else {})}))
        make_tokenizer("bytes", folder)  # a run's model has one
        plan = plan_of(folder, work, options, 0 if tiny else 1)
        processes = multiprocessing.get_context("spawn")
        own, other = processes.Pipe()
        engine = processes.Process(target=bare, args=(name, beside, work, other))
        engine.start()
        try:
            own.recv()  # the second takes its share of the memory that the first has left
            session = Session(plan.cluster, {"engine 0": Place(cpus=1, gpus=0 if tiny else 1)}, folder)
            session.start()
            asyncio.run(both(session, folder, plan, work, own, arguments.rounds))
            own.send(None)
            engine.join(30)
        finally:
            engine.kill()


if __name__ == "__main__":
    main()
