"""What passes between the rooms: `Prompt`, `Sample`, `Completion` and `Batch`.

Shapes: T all tokens of all samples of a batch, packed end to end; S samples; R response tokens of one sample;
P prompt tokens of one sample.

Every token column is token-aligned: entry t describes token t (its log-probability given what came before it,
its mask, its advantage). A sample's first token is never trained, because nothing came before it. That is said
here and derived nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from miles_core.specs import TOKEN_COLUMNS

Status = Literal["completed", "truncated", "aborted", "failed"]
IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One item of a data source, tokenised.

    tokens: int32 [P], the prompt with the chat template applied; answer: the reference answer, if the data has one;
    id: the item's position in the data source's endless sequence (unique within a stage);
    metadata: whatever else the data source knows, handed to rewards.
    """

    id: int
    tokens: IntArray
    text: str
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    temperature: 0 is greedy. top_p: only the most probable tokens with this much probability together; 1 switches it
    off. top_k: only so many most probable tokens; 0 switches it off. max_new_tokens: of a response. stop: texts that
    end a response and stay in it. stop_token_ids: tokens that do.

    Log-probabilities are those of the softmax at the temperature (at 1 when greedy) before any top-k or top-p cut,
    which is what the trainer computes too.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative (0 switches it off), got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A call for `n` completions of one token sequence.

    tokens: int32 [P]. seeds: one per completion; the same seed, weights and tokens give the same completion.
    """

    id: str
    tokens: IntArray
    sampling: Sampling
    seeds: tuple[int, ...] = (0,)

    @property
    def n(self) -> int:
        """Number of completions asked for."""
        return len(self.seeds)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What an engine generated for one seed of a request.

    tokens: int32 [R], the stop token included. logprobs: float32 [R], as `Sampling` defines them.
    versions: int32 [R], the version of the weights that made each token.
    routed_experts: optional int32 [P + R - 1, layers, top_k].
    """

    tokens: IntArray
    logprobs: FloatArray
    versions: IntArray
    status: Status
    routed_experts: IntArray | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One rollout: tokens in, tokens out; text is never tokenised again after generation.

    prompt: int32 [P]; response: int32 [R], which may hold tokens that the policy did not write (tool output);
    mask: bool [R], true where the token is trained; logprobs: float32 [R], the rollout's, 0 where not generated;
    versions: int32 [R], -1 where not generated. group: the id of the prompt; index: place among its samples.
    reward is None until scored; rewards holds each component before weighting; error says why scoring failed.
    baseline: it is never trained (its mask is all false) and only says how good the prompt is, as in ReMax.
    weight: how often it counts in the objective; see `miles_core.run.weights`.
    """

    group: int
    index: int
    prompt: IntArray
    response: IntArray
    mask: BoolArray
    logprobs: FloatArray
    versions: IntArray
    status: Status
    text: str
    reward: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    routed_experts: IntArray | None = None
    baseline: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        lengths = {len(self.response), len(self.mask), len(self.logprobs), len(self.versions)}
        if len(lengths) != 1:
            raise ValueError(
                f"sample {self.group}/{self.index}: response, mask, logprobs and versions disagree in length "
                f"({len(self.response)}, {len(self.mask)}, {len(self.logprobs)}, {len(self.versions)})"
            )


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """A call for log-probabilities of given tokens.

    tokens: int32 [L]. first: place of the first token that is scored, at least 1, since nothing comes before token 0.
    top_k: how many of the likeliest tokens are wanted at each place. temperature: as in `Sampling`, but not 0.
    """

    tokens: IntArray
    first: int = 1
    top_k: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.first <= len(self.tokens):
            raise ValueError(f"first must be between 1 and the {len(self.tokens)} tokens, got {self.first}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model thinks of the tokens of a `ScoreRequest`, from place `first` on; with R = L - first and K = top_k:

    logprobs: float32 [R], of each token given those before it. top_tokens: int32 [R, K], the likeliest tokens in its
    place, the likeliest first; top_logprobs: float32 [R, K], theirs.
    """

    logprobs: FloatArray
    top_tokens: IntArray
    top_logprobs: FloatArray


Group = list[Sample]
"""The samples of one prompt, in order of `index`."""

SAMPLE_COLUMNS = frozenset(
    {"reward", "group", "index", "minibatch", "prompt_length", "scored", "truncated", "baseline", "weight"}
)
"""Names of the per-sample columns a batch may have."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples packed end to end, as numpy arrays.

    cu_seqlens: int64 [S + 1]; sample s is tokens cu_seqlens[s] to cu_seqlens[s + 1], its prompt first.
    columns: token columns [T], named in `TOKEN_COLUMNS`: tokens int32, mask bool, rollout_logprobs float32,
    versions int32 always; weights, advantages, returns, old_logprobs, ref_logprobs, values float64 or float32 once
    computed; staleness float32, the versions that a generated token lags behind, where a loss reads it;
    teacher_logprobs float32, and teacher_top_tokens int32 and teacher_top_logprobs float32, both [T, K], the K tokens
    that the teacher finds likeliest in a token's place, where something reads them.
    samples: per-sample columns [S], named in `SAMPLE_COLUMNS`: reward float64, group int64, index int32, prompt_length
    int64, scored bool (neither failed nor aborted, so the reward means something), truncated bool, baseline bool,
    weight float64; minibatch int32 once the weights are computed.
    reward_parts: each reward component before weighting, float64 [S]. reward_weights: the weight of each, 1 if absent.
    temperature: of the sampling; the trainer divides logits by it. loss_options: options of the loss that are others
    for this batch than for the stage, because the run adapts them.

    `weights` is the loss aggregation: the objective of mini-batch m is exactly
    sum(weights * per_token_loss) over the tokens of the samples whose `minibatch` is m.
    """

    cu_seqlens: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]]
    samples: Mapping[str, NDArray[Any]]
    reward_parts: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    loss_options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if name not in TOKEN_COLUMNS:
                raise ValueError(f"{name!r} is not a token column; known: {', '.join(sorted(TOKEN_COLUMNS))}")
            if len(column) != self.tokens_total:
                raise ValueError(f"column {name!r} has {len(column)} entries for {self.tokens_total} tokens")
        for name, column in self.samples.items():
            if name not in SAMPLE_COLUMNS:
                raise ValueError(f"{name!r} is not a sample column; known: {', '.join(sorted(SAMPLE_COLUMNS))}")
            if len(column) != len(self):
                raise ValueError(f"sample column {name!r} has {len(column)} entries for {len(self)} samples")

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @property
    def tokens_total(self) -> int:
        """T, prompts included."""
        return int(self.cu_seqlens[-1])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, prompt included, [S]."""
        return np.diff(self.cu_seqlens)

    @property
    def segment_ids(self) -> NDArray[np.int64]:
        """The sample that each token belongs to, int64 [T]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def with_columns(self, **columns: NDArray[Any]) -> Batch:
        """The same batch with token columns added or replaced."""
        return replace(self, columns={**self.columns, **columns})

    def with_samples(self, **columns: NDArray[Any]) -> Batch:
        """The same batch with per-sample columns added or replaced."""
        return replace(self, samples={**self.samples, **columns})

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The samples at `indices`, in that order, with all their columns. The weights are kept as they are."""
        rows = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[rows]
        tokens = np.concatenate(
            [np.arange(self.cu_seqlens[row], self.cu_seqlens[row + 1]) for row in rows] or [np.empty(0, np.int64)]
        )
        return replace(
            self,
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            columns={name: column[tokens] for name, column in self.columns.items()},
            samples={name: column[rows] for name, column in self.samples.items()},
            reward_parts={name: column[rows] for name, column in self.reward_parts.items()},
        )

    @classmethod
    def pack(
        cls,
        samples: Sequence[Sample],
        *,
        temperature: float = 1.0,
        reward_weights: Mapping[str, float] | None = None,
    ) -> Batch:
        """Packs samples in the given order. Every sample needs a reward and at least one prompt token."""
        for sample in samples:
            if sample.reward is None:
                raise ValueError(f"sample {sample.group}/{sample.index} has no reward")
            if len(sample.prompt) == 0:
                raise ValueError(f"sample {sample.group}/{sample.index} has an empty prompt")
        lengths = [len(sample.prompt) + len(sample.response) for sample in samples]

        def column(name: str, fill: Any, dtype: Any) -> NDArray[Any]:
            parts = [
                part for sample in samples for part in (np.full(len(sample.prompt), fill, dtype), getattr(sample, name))
            ]
            return np.concatenate(parts or [np.empty(0)]).astype(dtype)

        tokens = [part for sample in samples for part in (sample.prompt, sample.response)]
        parts = sorted({name for sample in samples for name in sample.rewards})
        return cls(
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            columns={
                "tokens": np.concatenate(tokens or [np.empty(0, np.int32)]).astype(np.int32),
                "mask": column("mask", False, np.bool_),
                "rollout_logprobs": column("logprobs", 0.0, np.float32),
                "versions": column("versions", -1, np.int32),
            },
            samples={
                "reward": np.array([sample.reward for sample in samples], dtype=np.float64),
                "group": np.array([sample.group for sample in samples], dtype=np.int64),
                "index": np.array([sample.index for sample in samples], dtype=np.int32),
                "prompt_length": np.array([len(sample.prompt) for sample in samples], dtype=np.int64),
                "scored": np.array([sample.status not in ("failed", "aborted") for sample in samples], dtype=np.bool_),
                "truncated": np.array([sample.status == "truncated" for sample in samples], dtype=np.bool_),
                "baseline": np.array([sample.baseline for sample in samples], dtype=np.bool_),
                "weight": np.array([sample.weight for sample in samples], dtype=np.float64),
            },
            reward_parts={
                name: np.array([sample.rewards.get(name, np.nan) for sample in samples], dtype=np.float64)
                for name in parts
            },
            reward_weights=reward_weights or {},
            temperature=temperature,
        )
