"""Stand-ins that need neither a model nor a network: samples, batches, a tokenizer, and an engine behind a rollout."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from miles_core.roles import RunInfo
from miles_core.sample import Batch, Completion, Group, IntArray, Prompt, Request, Sample, Sampling, Status

END = 256
"""The end token of `ByteTokenizer`."""


class ByteTokenizer:
    """`roles.Tokenizer` with a token for each byte, an end token, and a plain chat template."""

    eos_token_id: int | None = END
    pad_token_id: int | None = END
    chat_template: str | None = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The bytes of the text; there are no special tokens to add."""
        return list(text.encode())

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        """The text of the bytes; the end token is "<end>" unless it is skipped."""
        end = b"" if skip_special_tokens else b"<end>"
        pieces = [end if token >= END else bytes([token]) for token in np.asarray(token_ids).tolist()]
        return b"".join(pieces).decode(errors="replace")

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """The messages, a line each, as text or (`tokenize=True`, as is the default) as tokens."""
        text = "".join(f"{message['role']}: {message['content']}\n" for message in conversation)
        text += "assistant: " if kwargs.get("add_generation_prompt") else ""
        return self.encode(text) if kwargs.get("tokenize", True) else text


def make_prompt(text: str = "What is 40 + 2?", *, answer: str | None = "42", **metadata: Any) -> Prompt:
    """A prompt with the bytes of `text` as tokens."""
    tokens = np.array(ByteTokenizer().encode(text), np.int32)
    return Prompt(id=3, tokens=tokens, text=text, answer=answer, metadata=metadata)


def make_sample(
    text: str = "42",
    *,
    group: int = 0,
    index: int = 0,
    reward: float | None = None,
    answer: str | None = "42",
    status: Status = "completed",
    metadata: Mapping[str, Any] | None = None,
) -> Sample:
    """A sample whose response is the bytes of `text` and the end token, all of it trained; none for an empty text."""
    response = np.array([*ByteTokenizer().encode(text), END] if text else [], np.int32)
    return Sample(
        group=group,
        index=index,
        prompt=np.array([65 + group, 66], np.int32),
        response=response,
        mask=np.ones(len(response), np.bool_),
        logprobs=np.linspace(-1.5, -0.5, len(response), dtype=np.float32),
        versions=np.zeros(len(response), np.int32),
        status=status,
        text=text,
        reward=reward,
        rewards={} if reward is None else {"fake": reward},
        answer=answer,
        metadata=metadata or {},
    )


def make_group(rewards: Sequence[float], *, group: int = 0, seed: int = 0) -> Group:
    """Scored samples of one prompt, with responses of random lengths; of the longer ones, some tokens are masked."""
    rng = np.random.default_rng([seed, group])
    samples = []
    for index, reward in enumerate(rewards):
        sample = make_sample("x" * int(rng.integers(1, 9)), group=group, index=index, reward=float(reward))
        mask = sample.mask.copy()
        mask[1:-1] = rng.random(len(mask) - 2) > 0.3
        samples.append(replace(sample, mask=mask))
    return samples


def make_batch(sizes: Sequence[int] = (4, 4, 3), *, seed: int = 0) -> Batch:
    """Groups of the given sizes, packed, with random rewards."""
    rng = np.random.default_rng(seed)
    groups = [make_group(rng.random(size).tolist(), group=group, seed=seed) for group, size in enumerate(sizes)]
    return Batch.pack([sample for group in groups for sample in group], reward_weights={"fake": 1.0})


def make_run(folder: Path) -> RunInfo:
    """A run of four steps in `folder`."""
    return RunInfo(name="contract", folder=folder, config={"seed": 0, "loss": {"name": "fake"}}, steps=4)


class FakeRolloutContext:
    """`roles.RolloutContext` over an engine that makes tokens up, and remembers each one.

    given: log-probability -> (token, version). No log-probability is ever given twice, so a sample's tokens can be told
    by it. completions: how many were asked for. status: of all completions.
    """

    version = 5

    def __init__(self, status: Status = "completed", max_tokens: int = 96) -> None:
        self.tokenizer = ByteTokenizer()
        self.sampling = Sampling(max_new_tokens=8)
        self.max_tokens = max_tokens
        self.status: Status = status
        self.given: dict[float, tuple[int, int]] = {}
        self.completions = 0
        self._count = itertools.count(1)

    async def generate(self, tokens: IntArray, seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """Letters, a function of tokens and seed; a completed one ends with the end token."""
        return [self._complete(tokens, seed, sampling) for seed in seeds]

    def _complete(self, tokens: IntArray, seed: int, sampling: Sampling) -> Completion:
        self.completions += 1
        rng = np.random.default_rng([seed, int(np.asarray(tokens, np.int64).sum()), len(tokens)])
        made = rng.integers(97, 123, rng.integers(1, sampling.max_new_tokens + 1)).astype(np.int32)
        if self.status == "completed":
            made[-1] = END
        logprobs = np.array([-next(self._count) / 1024 for _ in made], np.float32)
        for token, logprob in zip(made.tolist(), logprobs.tolist(), strict=True):
            self.given[logprob] = (token, self.version)
        versions = np.full(len(made), self.version, np.int32)
        return Completion(tokens=made, logprobs=logprobs, versions=versions, status=self.status)


def make_request(name: str, length: int, *, seeds: Sequence[int] = (0,), **sampling: Any) -> Request:
    """A request with `length` prompt tokens, different for each name."""
    rng = np.random.default_rng([length, *name.encode()])
    tokens = rng.integers(1, 60, length).astype(np.int32)
    return Request(id=name, tokens=tokens, sampling=Sampling(**sampling), seeds=tuple(seeds))
