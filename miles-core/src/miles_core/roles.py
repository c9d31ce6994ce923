"""Protocols of the components: what an Engine, a Trainer, a Reward … must do.

Shapes: T trained tokens of a micro-batch; S samples; N all tokens of a batch.
Tensors are torch tensors, but core never imports torch: it only passes them on.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from miles_core.sample import (
    Batch,
    Completion,
    Group,
    IntArray,
    Prompt,
    Request,
    Sample,
    Sampling,
    ScoreRequest,
    Scores,
)
from miles_core.specs import Layout

if TYPE_CHECKING:
    from torch import Tensor

PauseMode = Literal["drain", "abort", "retract", "in-place"]
"""How an engine stops for new weights. drain: what runs is finished first. abort: what runs returns as it is, status
"aborted". retract: what runs goes back to the queue with the tokens it has, and its cache is computed again with the
new weights. in-place: what runs goes on with its old cache and the new weights."""

# ---- Losses and advantages: pure functions of records -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Which sample each trained token belongs to, and sums over samples.

    ids: int64 tensor [T], 0 … count - 1. reduce adds up [count] partial sums over context-parallel ranks with a
    gradient; it is the identity where a sample lies whole on one rank. A loss that needs anything per sequence takes it
    from here and so knows nothing of parallelism.
    """

    ids: Tensor
    count: int
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums

    def sum(self, values: Tensor) -> Tensor:
        """[T] -> [count], the sum over each sample's trained tokens."""
        return self.reduce(values.new_zeros(self.count).index_add(0, self.ids, values))

    def mean(self, values: Tensor) -> Tensor:
        """[T] -> [count], the mean over each sample's trained tokens; 0 for a sample that has none."""
        return self.sum(values) / self.sum(values.new_ones(values.shape)).clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """[count] -> [T], each sample's value at each of its tokens."""
        return values[self.ids]


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What a loss may read; T counts the trained tokens only (mask true), so nothing has to be masked. K: the
    teacher's likeliest tokens at each place, as many as the loss asks for.

    logprobs: [T], of the policy being trained, with gradient. The others have none and are None unless the loss's
    record says it needs them: advantages, old_logprobs (the policy before this batch's first update),
    rollout_logprobs (the engine's), staleness (versions that lie between these two), ref_logprobs (frozen reference),
    teacher_logprobs; entropy [T], with gradient; teacher_top_logprobs [T, K], the teacher's of its likeliest tokens,
    the likeliest first, and top_logprobs [T, K], the policy's of the same tokens, with gradient. Raises `ValueError`
    where one is not of T entries: samples and batches, which know whose tokens they are, refuse that before.
    """

    logprobs: Tensor
    segments: Segments
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    staleness: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    teacher_top_logprobs: Tensor | None = None
    top_logprobs: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        for name, column in vars(self).items():
            if name != "segments" and column is not None and len(column) != len(self.logprobs):
                raise ValueError(f"{name} has {len(column)} entries for {len(self.logprobs)} trained tokens")


@dataclass(frozen=True, kw_only=True)
class CriticInputs:
    """What the loss of a critic may read; T as in `LossInputs`.

    values: [T], the critic's, with gradient; returns: [T], what they should be; old_values: [T], what they were before
    this batch's first update.
    """

    values: Tensor
    returns: Tensor
    old_values: Tensor
    segments: Segments


@dataclass(frozen=True, kw_only=True)
class LossOutputs:
    """losses: [T], one per trained token, never averaged; the trainer sums `weights * losses`.

    penalties: [T], terms that corrections leave alone, such as the KL divergence to a reference and the entropy bonus;
    `miles_core.run.objective` adds them to the corrected losses, so a trainer never sees them.
    metrics: name -> [T] without gradient; the step reports each one's mean over all trained tokens, or the maximum of
    one whose name ends in "_max".
    """

    losses: Tensor
    penalties: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """A pure function of a record and its options. Runs on every trainer rank, once a micro-batch."""

    def __call__(self, inputs: LossInputs, options: Any) -> LossOutputs: ...


class CriticLoss(Protocol):
    """The same for a critic; there are no penalties. Runs on every critic rank, once a micro-batch."""

    def __call__(self, inputs: CriticInputs, options: Any) -> LossOutputs: ...


@dataclass(frozen=True, kw_only=True)
class CorrectionInputs:
    """What a correction may read, all [T] and without gradient. logprobs: of the policy being trained, now.

    old_logprobs: of the policy before this batch's first update; rollout_logprobs: the engine's. advantages are None
    for a loss that reads none.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    segments: Segments
    advantages: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class CorrectionOutputs:
    """weights: [T], not negative, multiplied with each token's loss. metrics: as in `LossOutputs`."""

    weights: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Correction(Protocol):
    """A pure function of a record and its options. Runs on every trainer rank, once a micro-batch."""

    def __call__(self, inputs: CorrectionInputs, options: Any) -> CorrectionOutputs: ...


@dataclass(frozen=True, kw_only=True)
class AdvantageInputs:
    """rewards: float64 [S]. reward_parts: each component before weighting, float64 [S]; reward_weights: the weight of
    each. groups: int64 [S], equal for the samples of one prompt. baseline: bool [S], samples that are only there to be
    compared with; None if there are none. segment_ids: int64 [N], the sample of each token. mask: bool [N], trained
    tokens. columns: the token columns [N] that the record says it needs.

    Samples that could not be scored are left out, so all rewards are finite.
    """

    rewards: NDArray[np.float64]
    reward_parts: Mapping[str, NDArray[np.float64]]
    groups: NDArray[np.int64]
    segment_ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    baseline: NDArray[np.bool_] | None = None
    columns: Mapping[str, NDArray[np.floating[Any]]] = field(default_factory=dict)


class Advantage(Protocol):
    """A pure numpy function. Returns the token columns that its record `gives`, float64 [N], 0 where masked.

    Runs once a batch, in the collector.
    """

    def __call__(self, inputs: AdvantageInputs, options: Any) -> Mapping[str, NDArray[np.float64]]: ...


# ---- Data, rewards, filters, rollouts: in the collector ---------------------------------------------------------


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that Miles uses."""

    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class DataContext:
    """What a data source is built with. max_prompt_tokens: longer prompts do not fit and must be dropped or refused.

    seed: of the run; split: "train" or "eval", whose prompts must be disjoint where the source makes them up.
    """

    tokenizer: Tokenizer
    max_prompt_tokens: int
    seed: int
    split: Literal["train", "eval"] = "train"


class DataSource(Protocol):
    """An endless sequence of prompts, built as `Class(options, context)`. Runs in the collector.

    `Prompt.id` counts up from 0 and `next` is a function of the position alone, so that `seek(n)` continues exactly
    where a run stopped. `size` is the number of distinct prompts, None if it has no end.
    """

    size: int | None

    def next(self) -> Prompt: ...
    def seek(self, position: int) -> None: ...


class Reward(Protocol):
    """Scores samples, built as `Class(options)`; runs in a worker process that is killed past the time limit.

    `score` gets samples of one group and returns one finite float each.
    """

    def score(self, samples: Sequence[Sample]) -> Sequence[float]: ...


class Filter(Protocol):
    """Decides whether a scored group is trained on, built as `Class(options)`. Runs in the collector."""

    def keep(self, group: Group) -> bool: ...


class RolloutContext(Protocol):
    """What a rollout works with, in the collector."""

    tokenizer: Tokenizer
    sampling: Sampling
    max_tokens: int

    async def generate(self, tokens: IntArray, seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """One completion per seed of one token sequence, from whichever engine is free, in the order of the seeds."""
        ...


class Rollout(Protocol):
    """Turns a prompt into samples, built as `Class(options)`. Runs in the collector, many at once.

    Returns one unscored sample per seed, in order. Whatever it raises stops the run.
    """

    async def run(self, prompt: Prompt, seeds: Sequence[int], context: RolloutContext) -> Group: ...


# ---- Engines, trainers, weights: on the accelerators ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """What an engine is built with. model: a Hugging Face folder (config and tokenizer; weights are published).

    frozen: its weights are those in the folder, and nobody will publish any: it is ready after `start`.
    index: which of the run's engines it is; gone: those that have failed and will not come back. max_tokens: longest
    prompt plus response; threads: CPU threads it may use; hooks: calls `RolloutHooks` of the run's callbacks. verify:
    weights are compared with what the trainer has sent. sleeps: `sleep` will be called, so what it holds on GPUs must
    be able to go and come back. lost: to be called with the reason, in any thread, by an engine that finds that it
    cannot go on, because a process of its own has ended: the run starts another in its place.
    """

    model: Path
    index: int
    gpus: int
    threads: int
    dtype: Literal["float32", "bfloat16"]
    max_tokens: int
    seed: int
    folder: Path
    hooks: Any = None
    frozen: bool = False
    verify: bool = False
    sleeps: bool = False
    gone: frozenset[int] = frozenset()
    lost: Callable[[str], None] = lambda reason: None

    @property
    def place(self) -> int:
        """Which of the engines that are left it is: what counts for a weight sync."""
        return self.index - sum(other < self.index for other in self.gone)


@dataclass(frozen=True)
class Quotient:
    """A mean, share or rate: `part` / `whole`, each added up over engines first."""

    part: float
    whole: float


Measures = Mapping[str, float | Quotient]
"""What an engine measures: numbers to be added up over engines, and quotients."""


class Engine(Protocol):
    """Generates tokens, built as `Class(options, context)` in an actor of its own; all methods run on its event loop.

    It accepts requests at once after `start`, but generates only once it has received weights.

    busy_seconds: spent generating. An engine may have `async def measure(self) -> Measures` too: what only it knows of
    the time since the last call, which becomes the metrics `engine/NAME`. It is called once a step, beside what the
    trainer does, and left out if it takes long.
    """

    version: int
    busy_seconds: float

    async def start(self) -> None: ...

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, list[Completion]]]:
        """Requests given together enter together. Yields (request id, completions in seed order) as they finish."""
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Returns when nothing generates any more; later requests wait."""
        ...

    async def resume(self) -> None: ...
    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """Ends requests (all if None): they are yielded with what they have, status "aborted"."""
        ...

    def load(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Copies Hugging-Face-named tensors into the model. Called between `pause` and `resume`, from a thread."""
        ...

    def set_version(self, version: int) -> None:
        """All tensors of `version` are loaded."""
        ...

    async def sleep(self) -> None:
        """Gives GPU memory back; what generates is finished before, or goes on after `wake`, and later requests wait.
        Its weights may be lost: they are loaded again before it generates."""
        ...

    async def wake(self, part: Literal["weights", "all"] = "all") -> None:
        """Ends a sleep. "weights": only so far that `load` works; the rest comes with a second call."""
        ...

    async def stop(self) -> None: ...


class ScoringEngine(Engine, Protocol):
    """An engine with the feature "scores": it also says how likely given tokens are."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """One answer a request, in order. A request's numbers do not depend on what else the engine does meanwhile."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """What a trainer or a critic does until told otherwise, made by `miles_core.run.objective`.

    loss: an `Objective`, which is called as a `Loss`, or a `CriticLoss`; loss_options: its loss's, which change with
    the batch where the run adapts one (`options_for`). needs: token columns it reads. optimizer_steps: for schedules.
    entropy: whether the loss reads it. options: the trainer's options with this stage's overrides.
    """

    name: str
    loss: Callable[[Any, Any], LossOutputs]
    loss_options: Any
    entropy: bool
    needs: frozenset[str]
    optimizer_steps: int
    options: Any

    def options_for(self, batch: Batch) -> Any:
        """The loss's options for a batch: `loss_options` with what the batch says otherwise."""
        return replace(self.loss_options, **batch.loss_options) if batch.loss_options else self.loss_options


@dataclass(frozen=True, kw_only=True)
class TrainerContext:
    """What a trainer rank is built with. model: a Hugging Face folder; without weights in it they are made from `seed`.

    address: "tcp://host:port" for torch.distributed. reference: whether ref_logprobs will be asked for.
    hooks: calls `TrainerHooks` of the run's callbacks. timeout_s: for every wait on another rank. role: what it trains;
    a critic that has no ranks of its own is built after the policy's trainer, in the same process. verify: engines
    compare the weights that arrive with those that are sent. layout: where the engines are.
    """

    model: Path
    rank: int
    world_size: int
    address: str
    gpus: int
    threads: int
    seed: int
    reference: bool
    timeout_s: float
    hooks: Any = None
    role: Literal["policy", "critic"] = "policy"
    verify: bool = False
    layout: Layout = "disaggregated"


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Consecutive Hugging-Face-named tensors in one flat buffer of one dtype. flat: [sum of sizes]."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    flat: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by their names, in order: views of `flat`, which must hold the bytes."""
        parts = self.flat.split([math.prod(shape) for shape in self.shapes])  # type: ignore[no-untyped-call]
        return {name: part.view(shape) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class BucketLayout:
    """A bucket without its bytes: what a receiver must know before they arrive. dtype as "float32" or "bfloat16"."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str


Written = Callable[[bool], bool]
"""What `Trainer.save` gives for a checkpoint that is still being written. Called with False it says whether all ranks
have written everything, with True it waits for that. A collective; once it has said True, it is not called again.
Raises if something could not be written."""


class Trainer(Protocol):
    """One rank of the trainer, built as `Class(options, context)` in an actor. Every call reaches every rank.

    Metrics come from rank 0 and are already reduced over ranks.
    """

    def start(self) -> None:
        """Joins the process group, builds the model, loads its weights, calls the hook `model_built`."""
        ...

    def begin(self, stage: TrainStage) -> None:
        """A stage starts: new loss, new optimizer and schedule; the weights stay."""
        ...

    def logprobs(self, batch: Batch, which: Literal["policy", "reference"], step: int) -> NDArray[np.float32] | None:
        """Token column [N] without gradient, 0 where masked; None on every rank but 0."""
        ...

    def update(self, batch: Batch, step: int, passes: int) -> Mapping[str, float]:
        """`passes` times over the batch's mini-batches, an optimizer step each.

        Without a column old_logprobs there is one optimizer step, and the old log-probabilities are the policy's own.
        """
        ...

    def layout(self) -> Sequence[BucketLayout]:
        """What `export` will yield."""
        ...

    def export(self) -> Iterator[Bucket]:
        """The policy's weights. A collective: every rank iterates; only rank 0's buckets need hold bytes."""
        ...

    def save(self, folder: Path) -> Written | None:
        """Model, optimizer, schedule and random states as they are now, for `restore`; loading it executes nothing.

        None if it is written when this returns. Or it goes on beside the training, which then cannot change what is
        written, and `Written` says when it is done: the same kind of answer on every rank. The driver asks after each
        step, and waits before the next `save` and at the end.
        """
        ...

    def restore(self, folder: Path) -> None:
        """The exact opposite of `save`, in the same stage."""
        ...

    def save_pretrained(self, folder: Path) -> None:
        """The policy as a Hugging Face folder with its tokenizer."""
        ...

    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def stop(self) -> None: ...


class TrainerCheck(Protocol):
    """Refuses a run before it starts, where only the trainer knows better. Called by the planner, in the driver.

    options: the trainer's; config: the model's config.json; description: what the model's family says of it for the
    trainer's backend, None if it has none. policy: of a critic that shares the policy's ranks, the options of the
    policy's trainer; None of all others. folder: the model's, None for a new model and for a hub name. Raises
    `ValueError` with what is wrong and how to mend it; what is wrong with the folder begins with its path.
    """

    def __call__(
        self,
        options: Any,
        config: Mapping[str, Any],
        description: Any,
        world_size: int,
        policy: Any | None,
        folder: Path | None,
    ) -> None: ...


class Critic(Protocol):
    """One rank of a critic: the policy's model with a head that gives one number a token instead of logits. Built like
    a `Trainer`, as `Class(options, context)` with `context.role` "critic", and called like one: every call reaches
    every rank, metrics come from rank 0. Its methods are those of `Trainer`, but for two.

    A critic without ranks of its own shares each process with a rank of the policy's trainer, and with it the process
    group, which the trainer has joined before. No two calls of a process overlap.
    """

    def start(self) -> None: ...
    def load_pretrained(self, folder: Path) -> None:
        """Takes over the weights of a Hugging Face folder that the policy's trainer wrote; the head stays."""
        ...

    def begin(self, stage: TrainStage) -> None: ...
    def values(self, batch: Batch, step: int) -> NDArray[np.float32] | None:
        """Token column [N] without gradient, 0 where masked; None on every rank but 0.

        The value of token t is what is expected from there on before t is known: it is read where t is predicted.
        """
        ...

    def update(self, batch: Batch, step: int, passes: int) -> Mapping[str, float]: ...
    def save(self, folder: Path) -> Written | None: ...
    def restore(self, folder: Path) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def stop(self) -> None: ...


class WeightSender(Protocol):
    """The trainer's side of a weight sync, built as `Class(context, engines)` on every trainer rank."""

    def open(self) -> str:
        """Rank 0 opens a meeting point and returns its address."""
        ...

    def connect(self) -> None:
        """Waits until all engines are there. Runs while the receivers connect."""
        ...

    def send(self, buckets: Iterator[Bucket]) -> None:
        """Sends all buckets to all engines. Every rank calls it; rank 0 sends, with checksums if `context.verify`."""
        ...

    def give_up(self) -> None:
        """An engine has failed: whoever waits in `connect` or `send`, or in a receiver, raises `RunError` soon. Called
        on rank 0, on any thread. `close` comes next."""
        ...

    def close(self) -> None: ...


class WeightReceiver(Protocol):
    """An engine's side of a weight sync, built as `Class(context, engines, address, layout)` beside the engine."""

    def connect(self) -> None: ...
    def receive(self, load: Callable[[Sequence[str], Sequence[Tensor]], None]) -> None:
        """Receives all buckets, handing each one's tensors to `load`. Runs on a thread of its own. `RunError` if
        `context.verify` and a bucket's bytes are not those that were sent."""
        ...

    def close(self) -> None: ...


# ---- Models, trackers, runs ---------------------------------------------------------------------------------------


class ModelFamily(Protocol):
    """A model family, built as `Class()`; works on plain dictionaries, without torch.

    config: a Hugging Face config.json as a dictionary.
    """

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A complete config.json for a new model with the given fields; `ValueError` for an unknown field."""
        ...

    def parameters(self, config: Mapping[str, Any]) -> int:
        """Number of parameters, tied ones counted once."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a driver callback and a tracker know of the run.

    steps: of all stages. resumed: the step of the checkpoint that it goes on from; None if it begins, with
    `miles train` or with a `miles resume` that found no checkpoint.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    steps: int
    resumed: int | None = None


@runtime_checkable
class Tracker(Protocol):
    """Where metrics go, built as `Class(options, run)`. Runs in the driver.

    Where `run.resumed` is a step, all later ones are done again, and must not be there twice.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step, in the order of steps; an evaluation's follow those of its step."""
        ...

    def finish(self) -> None:
        """The run is over: finished, failed or interrupted. After a crash, nobody calls it."""
        ...
