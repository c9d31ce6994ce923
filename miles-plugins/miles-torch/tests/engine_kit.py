"""Tiny models with random weights, engines on them, and what transformers says of the same sequences."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from miles_core.roles import EngineContext
from miles_core.sample import Completion, Request, Sampling
from miles_torch.engine import TorchEngine
from miles_torch.engine_options import EngineOptions

VOCABULARY = 96
MAX_TOKENS = 64

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3-wide": lambda: Qwen3Config(**{**_GROUPED, "hidden_size": 64, "intermediate_size": 96, "head_dim": 64}),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_SIZES, num_key_value_heads=2),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=7),
    "gemma": lambda: GemmaConfig(**_GROUPED),
    "granite": lambda: GraniteConfig(**_SIZES, num_key_value_heads=2, residual_multiplier=0.5, logits_scaling=2.0),
    "gemma2": lambda: Gemma2Config(**_GROUPED, sliding_window=6, layer_types=_WINDOWED, query_pre_attn_scalar=8),
    "gpt-neox": lambda: GPTNeoXConfig(**_SIZES),
    "phi3": lambda: Phi3Config(**_SIZES, num_key_value_heads=2),
    "deepseek-v3": lambda: DeepseekV3Config(**_SIZES, **_LATENT),
    "gpt-oss": lambda: GptOssConfig(**_GROUPED, **_EXPERTS, sliding_window=5, layer_types=_WINDOWED),
}
FUSED = ("qwen3", "qwen3-wide", "llama", "qwen2")


def make_model(name: str = "qwen3", seed: int = 0) -> Any:
    """A model with random weights, large enough for its distributions to be far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def character_tokenizer() -> Any:
    """One token for each of `VOCABULARY` characters, with no end token."""
    known = {chr(ord(" ") + token): token for token in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(known, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, clean_up_tokenization_spaces=False
    )


def make_folder(path: Path, model: Any, *, tokenizer: bool = True) -> Path:
    """A model folder as the engine gets it, without weights."""
    model.config.save_pretrained(path)
    if tokenizer:
        character_tokenizer().save_pretrained(path)
    return path


def make_engine(folder: Path, *, hooks: Any = None, max_tokens: int = MAX_TOKENS, **options: Any) -> TorchEngine:
    return TorchEngine(
        EngineOptions(**options),
        EngineContext(
            model=folder, index=0, gpus=0, threads=1, dtype="float32", max_tokens=max_tokens, seed=0, folder=folder,
            hooks=hooks,
        ),
    )  # fmt: skip


def publish(engine: TorchEngine, model: Any, version: int) -> None:
    """Loads a model's weights in two buckets, tied ones once."""
    weights = {id(tensor): (name, tensor.detach()) for name, tensor in model.state_dict(keep_vars=True).items()}
    named = list(weights.values())
    for part in (named[:5], named[5:]):
        engine.load([name for name, _ in part], [tensor for _, tensor in part])
    engine.set_version(version)


@asynccontextmanager
async def running(folder: Path, model: Any | None = None, **options: Any) -> AsyncIterator[TorchEngine]:
    """A started engine, with the weights of `model` as version 0."""
    engine = make_engine(folder, **options)
    await engine.start()
    try:
        if model is not None:
            publish(engine, model, 0)
        yield engine
    finally:
        await engine.stop()


def prompts(count: int, seed: int = 0, longest: int = 20) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Random prompts of different lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, rng.integers(1, longest + 1)).astype(np.int32) for _ in range(count)]


def requests_of(tokens: Sequence[Any], sampling: Sampling, samples: int = 1) -> list[Request]:
    """A request for each prompt, with seeds of its own."""
    return [
        Request(
            id=str(index),
            tokens=each,
            sampling=sampling,
            seeds=tuple(index * 100 + sample for sample in range(samples)),
        )
        for index, each in enumerate(tokens)
    ]


async def collect(engine: TorchEngine, requests: Sequence[Request]) -> dict[str, list[Completion]]:
    """All completions of one call."""
    return {name: completions async for name, completions in engine.generate(requests)}


def generate(folder: Path, model: Any, requests: Sequence[Request], **options: Any) -> dict[str, list[Completion]]:
    """All completions of one call on an engine of its own."""

    async def run() -> dict[str, list[Completion]]:
        async with running(folder, model, **options) as engine:
            return await collect(engine, requests)

    return asyncio.run(run())


def same(left: Completion, right: Completion) -> bool:
    """Equal bit for bit."""
    return (
        np.array_equal(left.tokens, right.tokens)
        and np.array_equal(left.logprobs, right.logprobs)
        and np.array_equal(left.versions, right.versions)
        and left.status == right.status
    )


def reference_logprobs(model: Any, prompt: Any, response: Any, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of a response by one forward of transformers' own, float32 [R]."""
    tokens = torch.from_numpy(np.concatenate((prompt, response)).astype(np.int64)).unsqueeze(0)
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].float()
    logprobs: Tensor = torch.log_softmax(logits / temperature, dim=-1).gather(1, tokens[0, len(prompt) :, None])
    return logprobs.squeeze(1)


def reference_in_place(old: Any, new: Any, prompt: Any, response: Any, switch: int) -> Tensor:
    """Log-probabilities of the response when the weights change after `switch` tokens and the cache stays, [R]."""
    tokens = torch.from_numpy(np.concatenate((prompt, response)).astype(np.int64)).unsqueeze(0)
    cached = len(prompt) + switch - 1  # the newest token has not been through the model yet
    cache = DynamicCache()
    with torch.no_grad():
        first = old(tokens[:, :cached], past_key_values=cache, use_cache=True).logits[0]
        second = new(tokens[:, cached:], past_key_values=cache, use_cache=True).logits[0]
    logprobs = torch.log_softmax(torch.cat((first, second))[len(prompt) - 1 : -1], dim=-1)
    return logprobs.gather(1, tokens[0, len(prompt) :, None]).squeeze(1)


class Gate:
    """Holds an engine's thread after a number of steps, until it is opened."""

    def __init__(self, engine: TorchEngine, steps: int) -> None:
        generator = engine._scheduler._generator
        assert generator is not None
        self._step, self._left = generator.step, steps
        self._reached, self._open = threading.Event(), threading.Event()
        generator.step = self._gated  # type: ignore[method-assign]

    def _gated(self, version: int) -> Any:
        finished = self._step(version)
        self._left -= 1
        if self._left == 0:
            self._reached.set()
            assert self._open.wait(60)
        return finished

    async def reached(self) -> None:
        """Returns when the engine stands."""
        assert await asyncio.to_thread(self._reached.wait, 60)

    def open(self) -> None:
        """Lets the engine go on."""
        self._open.set()
