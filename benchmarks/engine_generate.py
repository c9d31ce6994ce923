"""The engine `torch` against transformers' `generate`: seconds for one wave of completions, on one CPU thread each.

    OMP_NUM_THREADS=1 python benchmarks/engine_generate.py [--rounds 15] [--profile]

A 3.4-million-parameter Qwen3 shape in float32; 8 prompts of 64 tokens, 4 samples each, exactly 64 new tokens,
temperature 1. The sides take turns; what counts is the median of the ratios of neighbouring runs, since a busy machine
slows both. The engine also returns log-probabilities and versions, which `generate` is not asked for. `--profile` then
shows where the engine's time goes, by PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from miles_core.roles import EngineContext
from miles_core.sample import Request, Sampling
from miles_torch.engine import TorchEngine
from miles_torch.engine_model import EngineModel
from miles_torch.engine_options import EngineOptions
from miles_torch.generator import Generation, Generator, PromptState
from miles_torch.stopping import StopRule

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 8, 4, 64, 64, 1024


def make_model() -> Any:
    """The shape of the issue's benchmark, with random weights and no end token."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=256, num_hidden_layers=4, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()  # type: ignore[no-untyped-call]


def transformers_side(model: Any, prompts: torch.Tensor, cache: str | None) -> Callable[[], None]:
    """One wave by `generate`, with the cache of that name."""
    tokens = prompts.repeat_interleave(SAMPLES, 0)

    def run() -> None:
        made = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, cache_implementation=cache,
        )  # fmt: skip
        assert made.shape == (PROMPTS * SAMPLES, PROMPT_TOKENS + NEW_TOKENS)

    return run


async def started_engine(model: Any, folder: Path) -> TorchEngine:
    """An engine with the weights of `model`."""
    model.config.save_pretrained(folder)
    context = EngineContext(
        model=folder, index=0, gpus=0, threads=1, dtype="float32", max_tokens=512, seed=0, folder=folder
    )
    engine = TorchEngine(EngineOptions(), context)
    await engine.start()
    state = model.state_dict()
    engine.load(list(state), list(state.values()))
    engine.set_version(0)
    return engine


async def wave(engine: TorchEngine, prompts: torch.Tensor) -> None:
    """One wave by the engine."""
    requests = [
        Request(
            id=str(index),
            tokens=tokens.astype(np.int32),
            sampling=Sampling(max_new_tokens=NEW_TOKENS),
            seeds=tuple(range(index * SAMPLES, (index + 1) * SAMPLES)),
        )
        for index, tokens in enumerate(prompts.numpy())
    ]
    made = [completion async for _, completions in engine.generate(requests) for completion in completions]
    assert [len(completion.tokens) for completion in made] == [NEW_TOKENS] * (PROMPTS * SAMPLES)


async def compare(rounds: int, profiled: bool) -> None:
    """Times the sides in turns and prints what came of it."""
    model = make_model()
    prompts = torch.randint(VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        engine = await started_engine(model, Path(folder))
    others = {
        "generate, dynamic cache": transformers_side(model, prompts, None),
        "generate, static cache": transformers_side(model, prompts, "static"),
    }
    seconds: dict[str, list[float]] = {"engine": [], **{name: [] for name in others}}
    for turn in range(rounds + 1):
        begin = time.perf_counter()
        await wave(engine, prompts)
        times = {"engine": time.perf_counter() - begin}
        for name, run in others.items():
            begin = time.perf_counter()
            run()
            times[name] = time.perf_counter() - begin
        if turn:  # the first round fills caches
            for name, once in times.items():
                seconds[name].append(once)
    tokens = PROMPTS * SAMPLES * NEW_TOKENS
    for name, taken in seconds.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(taken, seconds["engine"], strict=True))
        print(
            f"{name:25} median {statistics.median(taken):.3f} s, least {min(taken):.3f} s, "
            f"{tokens / statistics.median(taken):7.0f} tokens/s, {ratio:.2f} times the engine's time"
        )
    await engine.stop()
    if profiled:
        show_profile(model, prompts)


def show_profile(model: Any, prompts: torch.Tensor) -> None:
    """Where the time of a wave goes. On this thread, since the profiler sees no other."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        mine = EngineModel(Path(folder), device=torch.device("cpu"), dtype=torch.float32, max_tokens=512)
    state = model.state_dict()
    mine.load(list(state), list(state.values()))
    mine.finish_load()
    shared = [PromptState(tokens.astype(np.int32)) for tokens in prompts.numpy()]
    rule, sampling = StopRule(frozenset()), Sampling(max_new_tokens=NEW_TOKENS)
    generator = Generator(mine, 64)
    for _ in range(2):  # the second counts
        parts = [
            Generation.of(prompt, sampling, rule, seed, NEW_TOKENS) for prompt in shared for seed in range(SAMPLES)
        ]
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as report:
            generator.admit(parts, 0)
            while generator.active:
                generator.step(0)
    print(report.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true", dest="profiled")
    torch.set_num_threads(1)
    asyncio.run(compare(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
