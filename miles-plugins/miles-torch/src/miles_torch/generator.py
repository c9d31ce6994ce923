"""The synchronous core of the engine: sequences enter rows of a static cache, and every step gives each one a token.

Rows are dense. A sequence that finishes leaves at once and the last row moves into its place, so a step is one forward
over the first B rows and nothing is computed for empty ones. Completions of one prompt share one prefill: the prompt's
keys and values are copied, also from a sibling that is still generating when a later one enters.

Shapes: B rows in use; V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miles_core.errors import RunError
from miles_core.sample import Completion, IntArray, Sampling, Status
from miles_torch.attention import Decode, KVCache, Prefill
from miles_torch.engine_model import EngineModel
from miles_torch.sampling import SamplingTable, sample, uniforms
from miles_torch.stopping import StopRule

PREFILL_TOKENS = 8192
"""Most tokens in one prefill forward, unless one sequence alone is longer; bounds the memory of activations."""


@dataclass
class PromptState:
    """What the sequences of one prompt share. logits: float [V] after the prompt, by the weights of `version`."""

    tokens: IntArray
    logits: Tensor | None = None
    version: int = -1


@dataclass(eq=False)
class Generation:
    """One sequence being generated.

    limit: most tokens it may have. draws: float64 [limit], its uniform numbers. tokens, logprobs, versions: so far.
    prompt_version: weights that computed the keys and values of its prompt; -1 while it has none. ticket: its place in
    the order of arrival.
    """

    prompt: PromptState
    sampling: Sampling
    stop: StopRule
    limit: int
    draws: NDArray[np.float64]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    status: Status = "aborted"
    prompt_version: int = -1
    ticket: int = -1

    @classmethod
    def of(cls, prompt: PromptState, sampling: Sampling, stop: StopRule, seed: int, limit: int) -> Generation:
        """A sequence that has not begun."""
        draws = uniforms(seed, limit) if sampling.temperature else np.zeros(limit)
        return cls(prompt=prompt, sampling=sampling, stop=stop, limit=limit, draws=draws)

    @property
    def length(self) -> int:
        """Tokens so far, the prompt included."""
        return len(self.prompt.tokens) + len(self.tokens)

    def add(self, token: int, logprob: float, version: int) -> bool:
        """Takes one more token; true if it is the last, and then `status` says why."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if self.stop.ends(self.tokens):
            self.status = "completed"
            return True
        if len(self.tokens) == self.limit:
            self.status = "truncated"
            return True
        return False

    def completion(self) -> Completion:
        """What it has, with its status: "aborted" unless it came to an end."""
        return Completion(
            tokens=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            versions=np.array(self.versions, dtype=np.int32),
            status=self.status,
        )


class Generator:
    """Generates for at most `max_batch` sequences at once, on one thread."""

    def __init__(self, model: EngineModel, max_batch: int) -> None:
        self.model = model
        self.max_batch = max_batch
        self.cache = KVCache()
        self.active: list[Generation] = []
        self._table: SamplingTable | None = None

    @property
    def free(self) -> int:
        """Sequences that may still enter."""
        return self.max_batch - len(self.active)

    def admit(self, entering: Sequence[Generation], version: int) -> list[Generation]:
        """Lets sequences enter, in order, and gives each a token; those that end with it leave and are returned.

        A sequence that already has tokens goes on after them.
        """
        first = len(self.active)
        self.active.extend(entering)
        self.cache.reserve(len(self.active), max(len(each.prompt.tokens) + each.limit for each in entering))
        donors: dict[int, int] = {}
        computed: list[int] = []
        for row, each in enumerate(entering, first):
            donor = self._donor(each, row, version)
            if donor is None:
                computed.append(row)
            else:
                donors[row] = donor
            each.prompt_version = version
            if not each.tokens:
                each.prompt.version = version
        logits = self._prefill(computed)
        for row, after in logits.items():
            if not self.active[row].tokens:
                self.active[row].prompt.logits = after
        for row, donor in donors.items():
            self.cache.copy(donor, row, len(self.active[row].prompt.tokens))
            logits[row] = _present(self.active[row].prompt.logits)
        return self._extend(torch.stack([logits[row] for row in range(first, len(self.active))]), first, version)

    def _donor(self, entering: Generation, row: int, version: int) -> int | None:
        """A row before `row` whose cache begins with the prompt of a sequence that has not begun, by these weights."""
        if entering.tokens or entering.prompt.version != version:
            return None
        for index, other in enumerate(self.active[:row]):
            if other.prompt is entering.prompt and other.prompt_version == version:
                return index
        return None

    def _prefill(self, rows: Sequence[int]) -> dict[int, Tensor]:
        """Computes the sequences of `rows` from their first token; row -> logits [V] after their last."""
        logits: dict[int, Tensor] = {}
        for part in _parts(rows, [self.active[row].length for row in rows]):
            tokens = [np.concatenate((self.active[row].prompt.tokens, self.active[row].tokens)) for row in part]
            bounds = [0, *accumulate(len(each) for each in tokens)]
            step = Prefill(cache=self.cache, bounds=bounds, rows=part)
            packed = torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(self.model.device)
            logits.update(zip(part, self.model.prefill(packed, step), strict=True))
        return logits

    def step(self, version: int) -> list[Generation]:
        """One more token for every active sequence; those that end with it leave and are returned."""
        device = self.model.device
        lengths = [each.length for each in self.active]
        tokens = torch.tensor([each.tokens[-1] for each in self.active], device=device)
        # The newest token is not in the cache yet: its place is the last one.
        positions = torch.tensor(lengths, device=device) - 1
        step = Decode(cache=self.cache, positions=positions, length=max(lengths))
        return self._extend(self.model.decode(tokens, step), 0, version)

    def _extend(self, logits: Tensor, first: int, version: int) -> list[Generation]:
        """Draws a token for each row from `first` on, logits [B - first, V], and lets finished sequences leave."""
        rows = self.active[first:]
        table = self._table
        if table is None or first:
            table = SamplingTable.of([each.sampling for each in rows], logits.shape[-1], logits.device)
        self._table = None if first else table
        draws = torch.tensor([each.draws[len(each.tokens)] for each in rows], device=logits.device)
        tokens, logprobs = sample(logits, table, draws)
        drawn, chances = torch.stack((tokens.double(), logprobs.double())).tolist()  # the step's only wait for a device
        if not math.isfinite(sum(chances)):
            raise RunError(f"the weights of version {version} give log-probabilities that are not finite numbers")
        ended = [
            index
            for index, each in enumerate(rows, first)
            if each.add(int(drawn[index - first]), chances[index - first], version)
        ]
        finished = [self.active[index] for index in ended]
        self.remove(finished)
        return finished

    def remove(self, leaving: Sequence[Generation]) -> None:
        """Takes sequences out; the last rows move into their places."""
        for row in sorted((self.active.index(each) for each in leaving), reverse=True):
            last = self.active.pop()
            if row < len(self.active):
                self.cache.copy(len(self.active), row, last.length)
                self.active[row] = last
        if leaving:
            self._table = None

    def sleep(self) -> None:
        """Frees what can be had again: the cache, and on an accelerator the weights' memory."""
        assert not self.active, "what runs is taken out first"
        self.cache.clear()
        self.model.sleep()

    def wake(self) -> None:
        """Ends a sleep."""
        self.model.wake()


def _present(logits: Tensor | None) -> Tensor:
    assert logits is not None, "a prompt that has been computed has its logits"
    return logits


def _parts(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Rows in order, cut so that each part has at most `PREFILL_TOKENS` tokens."""
    parts: list[list[int]] = []
    total = 0
    for row, length in zip(rows, lengths, strict=True):
        if not parts or total + length > PREFILL_TOKENS:
            parts.append([])
            total = 0
        parts[-1].append(row)
        total += length
    return parts
