"""The sections of a run file that core owns, and the `Plan`: a run with every name resolved and every value checked.

Sections whose component comes from a plugin hold core's own keys (named here) beside the component's options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from miles_core.roles import PauseMode
from miles_core.sample import Sampling
from miles_core.specs import (
    AdvantageSpec,
    CallbackSpec,
    CorrectionSpec,
    DataSourceSpec,
    EngineSpec,
    FilterSpec,
    Layout,
    LossSpec,
    Options,
    RewardSpec,
    RolloutSpec,
    Spec,
    TrackerSpec,
    TrainerSpec,
    WeightSyncSpec,
)

S_co = TypeVar("S_co", bound=Spec, covariant=True)

OldPolicy = Literal["recompute", "rollout", "interpolate"]
Aggregation = Literal["token", "sequence", "sequence-sum", "group", "constant"]

LONGEST_S = 10_000_000
"""The longest time limit, in seconds: some months."""


def _positive(section: str, **values: float) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{section}.{name} must be at least 1, got {value}")


def _not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{section}.{name} must not be negative, got {value}")


def _limit(name: str, seconds: float) -> None:
    """No system's clocks take any number of seconds."""
    if not 0 < seconds <= LONGEST_S:
        raise ValueError(f"{name} must be positive and at most {LONGEST_S}, got {seconds}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`[schedule]`: how much of everything.

    steps: how often a batch is generated and trained on. prompts_per_step, samples_per_prompt: their product is the
    samples of a batch. updates_per_batch: passes over a batch. minibatches: optimizer steps of one pass, of about
    equally many samples. max_staleness: how many weight versions a sample may lag behind when it is trained: 0 is
    synchronous, 1 one step ahead, k fully asynchronous. over_sample: prompts begun beyond those that are needed, so
    that a batch is made of the first that are done; see `miles_core.run.collector`.
    """

    steps: int
    prompts_per_step: int
    samples_per_prompt: int = 1
    updates_per_batch: int = 1
    minibatches: int = 1
    max_staleness: int = 0
    over_sample: int = 0

    def __post_init__(self) -> None:
        _positive(
            "schedule",
            steps=self.steps,
            prompts_per_step=self.prompts_per_step,
            samples_per_prompt=self.samples_per_prompt,
            updates_per_batch=self.updates_per_batch,
            minibatches=self.minibatches,
        )
        _not_negative("schedule", max_staleness=self.max_staleness, over_sample=self.over_sample)
        if self.minibatches > self.prompts_per_step * self.samples_per_prompt:
            raise ValueError(f"schedule.minibatches ({self.minibatches}) exceeds the samples of a step")

    @property
    def updates_of_a_batch(self) -> int:
        """Optimizer steps of one step of the loop."""
        return self.updates_per_batch * self.minibatches

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.steps * self.updates_of_a_batch


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """`[model]`: either a `path` or a `family`.

    path: a Hugging Face folder or hub name. family: a model family, for a new model with random weights. config: fields
    of the new model's config.json. tokenizer: of the new model, "bytes" or "ascii". max_tokens: longest prompt plus
    response. dtype: what the engine computes in.
    """

    path: str | None = None
    family: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "bytes"
    max_tokens: int = 2048
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.family is None):
            raise ValueError("model needs either `path` or `family`, and not both")
        for name, said in (("config", bool(self.config)), ("tokenizer", self.tokenizer != "bytes")):
            if said and self.path is not None:
                raise ValueError(f"{name} is for a new model, one of a family; the folder of model.path has its own")
        _positive("model", max_tokens=self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class LossSection:
    """`[loss]`, beside the loss's own options. name: of the loss. aggregation: how per-token losses become one
    number, through `Batch.weights`; see `miles_core.run.weights`. aggregation_length: the constant of "constant".
    mask_truncated: samples that reached the length limit are not trained, but their rewards still count for the
    advantages of their siblings (overlong filtering). old_policy: what the loss takes for the policy before the batch's
    first update; see `miles_core.run.objective`."""

    name: str
    aggregation: Aggregation = "token"
    aggregation_length: int | None = None
    mask_truncated: bool = False
    old_policy: OldPolicy = "recompute"

    def __post_init__(self) -> None:
        if (self.aggregation == "constant") != (self.aggregation_length is not None):
            raise ValueError('loss.aggregation_length goes with loss.aggregation = "constant", and only with it')
        if self.aggregation_length is not None:
            _positive("loss", aggregation_length=self.aggregation_length)


@dataclass(frozen=True, kw_only=True)
class KLSection:
    """`[kl]`: target: the KL divergence to the reference that the `kl_coef` of the advantage or the loss is adapted to,
    in nats; None leaves it as it is. per: of a whole "sequence" or a "token". horizon: samples over which the
    coefficient about follows a lasting error; see `miles_core.run.kl`."""

    target: float | None = None
    per: Literal["sequence", "token"] = "sequence"
    horizon: int = 10_000

    def __post_init__(self) -> None:
        if self.target is not None and self.target <= 0:
            raise ValueError(f"kl.target must be positive, got {self.target}")
        _positive("kl", horizon=self.horizon)


@dataclass(frozen=True, kw_only=True)
class RewardSection:
    """`[reward]` or each `[[reward]]`, beside the reward's own options. name: of the reward. weight: the sample's
    reward is the weighted sum. timeout_s: for the samples of one prompt; past it they are marked and counted as
    failed."""

    name: str
    weight: float = 1.0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        _limit("timeout_s", self.timeout_s)
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """`[engine]`, beside the engine's own options. name: of the engine. count: how many engines. gpus: GPUs of each.
    threads: CPU threads of each, without GPUs."""

    name: str
    count: int = 1
    gpus: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        _positive("engine", count=self.count, threads=self.threads)
        _not_negative("engine", gpus=self.gpus)


@dataclass(frozen=True, kw_only=True)
class TrainerSection:
    """`[trainer]`, beside the trainer's own options. name: of the trainer. gpus: as many ranks, with one GPU each.
    ranks: without GPUs, how many. threads: CPU threads of each rank, without GPUs."""

    name: str
    gpus: int = 0
    ranks: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        _positive("trainer", ranks=self.ranks, threads=self.threads)
        _not_negative("trainer", gpus=self.gpus)
        if self.gpus and self.ranks != 1:
            raise ValueError("trainer.ranks is for CPUs; with trainer.gpus there is one rank a GPU")

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.gpus or self.ranks


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    """`[critic]`, beside `loss`, which it is trained with, and the options of the trainer that trains it; what it does
    not say is as in `[trainer]`, if it is the same trainer. name: of that trainer. gpus, ranks, threads: as there, for
    ranks of its own; it shares the policy's without gpus and ranks. warmup_steps: so many steps at the beginning of a
    stage teach the critic alone."""

    name: str
    gpus: int = 0
    ranks: int = 0
    threads: int = 1
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _positive("critic", threads=self.threads)
        _not_negative("critic", gpus=self.gpus, ranks=self.ranks, warmup_steps=self.warmup_steps)
        if self.gpus and self.ranks:
            raise ValueError("critic.ranks is for CPUs; with critic.gpus there is one rank a GPU")
        if self.shares and self.threads != 1:
            raise ValueError("critic.threads is for ranks of its own; set critic.ranks too, or trainer.threads instead")

    @property
    def world_size(self) -> int:
        """Number of ranks of its own; 0 if it shares the policy's."""
        return self.gpus or self.ranks

    @property
    def shares(self) -> bool:
        """Whether it is on the policy's ranks."""
        return self.world_size == 0


@dataclass(frozen=True, kw_only=True)
class TeacherSection:
    """`[teacher]`: a model that the policy learns from, which says how likely it finds the policy's tokens. path: a
    Hugging Face folder or hub name, with weights and with the policy's tokenizer. dtype: what it computes in.
    engine: what serves it, a section like `[engine]`."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"


SECTIONS: Mapping[str, type[Any]] = {
    "critic": CriticSection,
    "engine": EngineSection,
    "loss": LossSection,
    "reward": RewardSection,
    "trainer": TrainerSection,
}
"""Section -> core's own keys in it, beside a component's options."""


def own_keys(section: str) -> frozenset[str]:
    """Core's own keys in a section, which no option can have."""
    return frozenset(field.name for field in fields(SECTIONS[section])) if section in SECTIONS else frozenset()


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """`[evaluation]`: on held-out prompts, those of the data source's split "eval".

    every: steps between two evaluations; there is also one before the first step and one after each stage. 0 switches
    evaluation off. prompts: how many, from the first. samples_per_prompt: of each. temperature: of the sampling, 0 is
    greedy."""

    every: int = 0
    prompts: int = 128
    samples_per_prompt: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("evaluation", every=self.every, temperature=self.temperature)
        _positive("evaluation", prompts=self.prompts, samples_per_prompt=self.samples_per_prompt)


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """`[checkpoint]`: what `miles resume` goes on from. every: steps between two; 0 saves one at the end alone. keep:
    how many of the newest are kept."""

    every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        _not_negative("checkpoint", every=self.every)
        _positive("checkpoint", keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class PublishSection:
    """`[publish]`: how new weights reach the engines. mode: how engines stop for them; see `roles.PauseMode`. sync: the
    weight sync, which has to be said only where several serve the run's trainer and engine. verify: "checksum" compares
    what arrived with what was sent, and stops the run if it differs; it costs time at every publish."""

    mode: PauseMode = "drain"
    sync: str | None = None
    verify: Literal["none", "checksum"] = "none"


@dataclass(frozen=True, kw_only=True)
class PlacementSection:
    """`[placement]`: where trainer and engines are. layout: "disaggregated", each on GPUs of its own, or "colocated":
    the GPUs of the trainer's ranks are those of the engines, in the same order, and they take turns; without GPUs they
    are beside each other on one machine. sleep: of two that are colocated, the one that does not work gives its GPU
    memory back meanwhile; without it, both must fit at once."""

    layout: Layout = "disaggregated"
    sleep: bool = True

    @property
    def takes_turns(self) -> bool:
        """Whether one sleeps while the other works."""
        return self.sleep and self.layout == "colocated"


@dataclass(frozen=True, kw_only=True)
class ClusterSection:
    """`[cluster]`: where the processes run. address: of a running Ray cluster; without one, Ray is started on this
    machine and lives as long as the run. deadline_s: the longest wait for any process, in seconds; past it the run
    stops and names who is late."""

    address: str | None = None
    deadline_s: float = 600.0

    def __post_init__(self) -> None:
        _limit("deadline_s", self.deadline_s)


@dataclass(frozen=True, kw_only=True)
class PluginsSection:
    """`[plugins]`: which are loaded. disable: distributions that are not, for this run."""

    disable: tuple[str, ...] = ()


# ---- The plan: everything above with its components resolved ------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Component(Generic[S_co]):
    """A record, who declared it, and its options (an instance of its options dataclass, or None)."""

    spec: S_co
    plugin: str
    options: Options = None


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The run's teacher, and the engines that serve it."""

    section: TeacherSection
    engine: Component[EngineSpec]
    engine_section: EngineSection


@dataclass(frozen=True, kw_only=True)
class StageCritic:
    """The critic in a stage. trainer: the one that trains it, with this stage's options; loss: what it is trained with;
    warmup_steps: of the stage, in which it learns alone."""

    trainer: Component[TrainerSpec]
    loss: Component[LossSpec]
    warmup_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with its own data, rollout, rewards, loss and schedule. Weights go on from stage to stage.

    trainer: the run's trainer with this stage's options. first_step: steps of the stages before it.
    rewards: empty only if the rollout does not generate and nothing reads rewards. advantage: None if the loss reads
    none of what it gives. critic: None if the advantage reads no values.
    """

    name: str
    first_step: int
    schedule: Schedule
    sampling: Sampling
    data: Component[DataSourceSpec]
    rollout: Component[RolloutSpec]
    rewards: tuple[tuple[Component[RewardSpec], RewardSection], ...]
    filters: tuple[Component[FilterSpec], ...]
    advantage: Component[AdvantageSpec] | None
    loss: Component[LossSpec]
    loss_section: LossSection
    trainer: Component[TrainerSpec]
    corrections: tuple[Component[CorrectionSpec], ...] = ()
    critic: StageCritic | None = None
    kl: KLSection = field(default_factory=KLSection)

    @property
    def last_step(self) -> int:
        """The step after which the stage is over."""
        return self.first_step + self.schedule.steps

    @property
    def warmup_steps(self) -> int:
        """So many of the first steps leave the policy alone."""
        return self.critic.warmup_steps if self.critic is not None else 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run, checked. Picklable; every process gets it. needs no torch.

    folder: the run folder, not yet made. directory: where the run was started, which relative paths in it are relative
    to, in every process and after a resume from elsewhere. engine, sync: None if no stage generates and nothing is
    evaluated. critic: the trainer that trains it, None if there is no critic.
    values: the resolved run file, nested; origins: dotted name -> where the value came from.
    plugin_set: the plugins that every process must load, as (distribution, version, entry point value).
    """

    name: str
    folder: Path
    seed: int
    model: ModelSection
    engine: Component[EngineSpec] | None
    engine_section: EngineSection | None
    trainer: Component[TrainerSpec]
    trainer_section: TrainerSection
    sync: Component[WeightSyncSpec] | None
    evaluation: EvaluationSection
    checkpoint: CheckpointSection
    publish: PublishSection
    cluster: ClusterSection
    stages: tuple[Stage, ...]
    callbacks: tuple[Component[CallbackSpec], ...]
    trackers: tuple[Component[TrackerSpec], ...]
    plugin_set: tuple[tuple[str, str, str], ...]
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    directory: Path = field(default_factory=Path.cwd)
    critic: Component[TrainerSpec] | None = None
    critic_section: CriticSection | None = None
    teacher: Teacher | None = None
    placement: PlacementSection = field(default_factory=PlacementSection)

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return self.stages[-1].last_step

    def stage_of(self, step: int) -> Stage:
        """The stage that step number `step` (from 0) belongs to."""
        return next(stage for stage in self.stages if step < stage.last_step)
