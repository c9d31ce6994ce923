"""The records that declaration hooks yield.

A record names an implementation without importing it (`ref`, "module:attribute") and carries *traits*: what it needs,
gives or serves. Core decides by traits, never by names, so a whole run can be refused before it starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

TOKEN_COLUMNS = frozenset(
    {
        "tokens", "mask", "rollout_logprobs", "versions", "weights", "advantages", "returns",
        "old_logprobs", "ref_logprobs", "values", "staleness",
        "teacher_logprobs", "teacher_top_tokens", "teacher_top_logprobs",
    }
)  # fmt: skip
"""Names of the per-token columns that a batch may have, so what a loss or an advantage may need."""

_NAME = re.compile(r"[a-z0-9]+\+*([.-][a-z0-9]+\+*)*")
_REF = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What every record has.

    name: kebab-case, what a run file says; ref: "module:attribute" of the implementation, imported only on use;
    summary: one line for `miles plugins info`; options: "module:Class" of a frozen keyword-only dataclass in a module
    that imports nothing heavy, or None if there is nothing to set. example: "module:function" that gives a
    `miles_core.testing.Example`, for contract tests of what cannot be tried with default options. extra: the extra of
    its distribution that it cannot run without, or None; gpu_extra: one that it wants on GPUs. `miles doctor` reads
    both.
    """

    kind: ClassVar[str]
    name: str
    ref: str
    summary: str
    options: str | None = None
    example: str | None = None
    extra: str | None = None
    gpu_extra: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{type(self).__name__} name {self.name!r} is not kebab-case")
        _check_refs(self, ref=self.ref, options=self.options, example=self.example)
        if not self.summary.strip():
            raise ValueError(f"{self.kind} {self.name!r} has no summary")


def _check_refs(spec: Spec, **refs: str | None) -> None:
    for label, ref in refs.items():
        if ref is not None and not _REF.fullmatch(ref):
            raise ValueError(f"{spec.kind} {spec.name!r}: {label} {ref!r} is not 'module:attribute'")


def _check_columns(spec: Spec, columns: frozenset[str]) -> None:
    unknown = columns - TOKEN_COLUMNS
    if unknown:
        raise ValueError(
            f"{spec.kind} {spec.name!r} names unknown columns {sorted(unknown)}; known: {sorted(TOKEN_COLUMNS)}"
        )


@dataclass(frozen=True, kw_only=True)
class LossSpec(Spec):
    """A loss: `ref` is a `roles.Loss`, or a `roles.CriticLoss` if it trains a critic.

    trains: a "policy", with or without a critic; an "actor", a policy that is not trained without one; or a "critic".
    needs: token columns it reads. needs_if: column -> the option that, when truthy, makes it needed
    (`{"ref_logprobs": "kl_coef"}`). kl_coef: the option that weighs the KL divergence to the reference, so that a run
    can adapt it. entropy_if: the option that, when truthy, makes it read `LossInputs.entropy`, which is computed only
    then. compares_samples: what it gives a token depends on other samples of the micro-batch, so the result depends on
    how samples are packed; leave it alone unless a paper asks for it. top_k: the option that says how many of the
    teacher's likeliest tokens it reads, if it needs them ("teacher_top_tokens").
    """

    kind: ClassVar[str] = "loss"
    trains: Literal["policy", "actor", "critic"] = "policy"
    needs: frozenset[str] = frozenset()
    needs_if: Mapping[str, str] = field(default_factory=dict)
    kl_coef: str | None = None
    entropy_if: str | None = None
    compares_samples: bool = False
    top_k: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_columns(self, self.needs | frozenset(self.needs_if))
        if ("teacher_top_tokens" in self.needs) != (self.top_k is not None):
            raise ValueError(f"loss {self.name!r}: the column teacher_top_tokens and the trait top_k go together")


@dataclass(frozen=True, kw_only=True)
class CorrectionSpec(Spec):
    """A correction for samples that another policy than the trained one wrote: `ref` is a `roles.Correction`.

    needs, needs_if: token columns it reads, as in `LossSpec`. The two policies' log-probabilities, which every
    correction is given, are always among `needs`, said or not.
    """

    kind: ClassVar[str] = "correction"
    needs: frozenset[str] = frozenset({"old_logprobs", "rollout_logprobs"})
    needs_if: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs", self.needs | {"old_logprobs", "rollout_logprobs"})
        _check_columns(self, self.needs | frozenset(self.needs_if))


@dataclass(frozen=True, kw_only=True)
class AdvantageSpec(Spec):
    """An advantage estimator: `ref` is a `roles.Advantage`.

    needs, needs_if: token columns beside the mask, as in `LossSpec`; kl_coef as there. gives: token columns it fills.
    groups: it compares the samples of one prompt, so it needs at least two of them.
    baseline: it reads the rewards of samples that a rollout of the same trait made only to be compared with.
    rewards_if: the option that, when truthy, makes it read rewards; without one it always does.
    """

    kind: ClassVar[str] = "advantage"
    needs: frozenset[str] = frozenset()
    needs_if: Mapping[str, str] = field(default_factory=dict)
    kl_coef: str | None = None
    gives: frozenset[str] = frozenset({"advantages"})
    groups: bool = False
    baseline: bool = False
    rewards_if: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_columns(self, self.needs | frozenset(self.needs_if) | self.gives)


@dataclass(frozen=True, kw_only=True)
class RewardSpec(Spec):
    """A reward: `ref` is a `roles.Reward` class.

    needs_answer: it reads `Sample.answer`. deterministic: the same samples always get the same scores.
    scope: "sample" scores each sample by itself, "group" needs all samples of a prompt together.
    """

    kind: ClassVar[str] = "reward"
    needs_answer: bool = False
    deterministic: bool = True
    scope: Literal["sample", "group"] = "sample"


@dataclass(frozen=True, kw_only=True)
class FilterSpec(Spec):
    """A filter of scored groups: `ref` is a `roles.Filter` class. What it drops is counted and replaced."""

    kind: ClassVar[str] = "filter"


@dataclass(frozen=True, kw_only=True)
class RolloutSpec(Spec):
    """A rollout: `ref` is a `roles.Rollout` class.

    engine: it generates, so the run needs an engine; False for rollouts that read their responses from the data.
    turns: "multi" if tool or environment output stands between the policy's tokens.
    baseline: one sample of each prompt only says how good the prompt is (`Sample.baseline`).
    """

    kind: ClassVar[str] = "rollout"
    engine: bool = True
    turns: Literal["single", "multi"] = "single"
    baseline: bool = False


@dataclass(frozen=True, kw_only=True)
class DataSourceSpec(Spec):
    """A source of prompts: `ref` is a `roles.DataSource` class.

    answers: its prompts carry a reference answer. check: "module:function", in a module that imports nothing heavy, or
    None: `miles plan` calls it with the options, and shows the `ValueError` that it raises beside the line of the
    option that the message names. It is for a light look, such as whether files are there.
    """

    kind: ClassVar[str] = "data source"
    answers: bool = False
    check: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_refs(self, check=self.check)


@dataclass(frozen=True, kw_only=True)
class EngineSpec(Spec):
    """An inference engine: `ref` is a `roles.Engine` class.

    features: what else it can do: "seeds" (the same seed gives the same completion), "routed-experts", "scores" (it is
    a `roles.ScoringEngine`, so it can serve a teacher). pause_modes: the ways it can stop for new weights. devices:
    what it runs on. flags: "module:function" that gives its `miles_core.flags.Flags`, which stand after `--`, or None
    if it takes none.
    """

    kind: ClassVar[str] = "engine"
    features: frozenset[str] = frozenset()
    pause_modes: frozenset[str] = frozenset({"drain"})
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    flags: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_refs(self, flags=self.flags)


@dataclass(frozen=True, kw_only=True)
class TrainerSpec(Spec):
    """A trainer: `ref` is a `roles.Trainer` class.

    gives: token columns it can compute ("old_logprobs", "ref_logprobs"). critic: "module:Class" of the `roles.Critic`
    that gives "values", built with the same options class; None if there is none.
    families: it accepts only architectures of installed model plugins if "listed", any if "any".
    backend: the framework that a family must describe itself for (`ModelSpec.backends`), None if it needs no such
    description. check: "module:function" of a `roles.TrainerCheck`, in a module that imports nothing heavy, or None.
    flags: "module:function" that gives its `miles_core.flags.Flags`, which stand after `--`, or None if it takes none.
    top_logprobs: it gives losses `LossInputs.top_logprobs`. devices: what it runs on.
    """

    kind: ClassVar[str] = "trainer"
    gives: frozenset[str] = frozenset({"old_logprobs"})
    critic: str | None = None
    families: Literal["any", "listed"] = "any"
    backend: str | None = None
    check: str | None = None
    flags: str | None = None
    top_logprobs: bool = False
    devices: frozenset[str] = frozenset({"cpu", "cuda"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_columns(self, self.gives)
        if "values" in self.gives:
            raise ValueError(f"trainer {self.name!r}: values are given by a critic; name its class in `critic`")
        _check_refs(self, critic=self.critic, check=self.check, flags=self.flags)


Layout = Literal["disaggregated", "colocated"]
"""Where trainer and engines are. disaggregated: each on machines and GPUs of its own. colocated: the GPUs of the
trainer's ranks are those of the engines, in the same order; without GPUs, they are on one machine."""


@dataclass(frozen=True, kw_only=True)
class WeightSyncSpec(Spec):
    """A way for weights to go from a trainer to an engine.

    trainer, engine: names of the pair it serves. ref: the `roles.WeightSender` class, built on every trainer rank.
    receiver: "module:Class" of the `roles.WeightReceiver`, built beside every engine. layouts: where the two may be.
    """

    kind: ClassVar[str] = "weight sync"
    trainer: str
    engine: str
    receiver: str
    layouts: frozenset[Layout] = frozenset({"disaggregated"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _REF.fullmatch(self.receiver):
            raise ValueError(f"weight sync {self.name!r}: receiver {self.receiver!r} is not 'module:attribute'")


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Spec):
    """A model family: `ref` is a `roles.ModelFamily` class.

    architectures: the names in a Hugging Face config.json that it covers. model_types: of those, only models whose
    config.json has one of these model types; any if there are none. backends: training framework ->
    "module:function" that describes a model of it for that framework, given its config.json as a dictionary; for
    "megatron" it gives a `miles_core.megatron.MegatronModel`, for "transformers" one of its configurations, which only
    a model type needs that transformers does not know. The module imports nothing heavy.
    """

    kind: ClassVar[str] = "model"
    architectures: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    backends: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for backend, ref in self.backends.items():
            if not _REF.fullmatch(ref):
                raise ValueError(f"model {self.name!r}: backend {backend!r}: {ref!r} is not 'module:attribute'")

    def covers(self, config: Mapping[str, Any]) -> bool:
        """Whether the model of a config.json is of this family."""
        known = set(self.architectures) & set(config.get("architectures") or ())
        return bool(known) and (not self.model_types or config.get("model_type") in self.model_types)


@dataclass(frozen=True, kw_only=True)
class TrackerSpec(Spec):
    """Where metrics go: `ref` is a `roles.Tracker` class."""

    kind: ClassVar[str] = "tracker"


@dataclass(frozen=True, kw_only=True)
class CallbackSpec(Spec):
    """An object that hears what happens in a run: `ref` is a class whose methods implement lifecycle hooks.

    runs_on: the process roles it is built in, each of which hears its own hooks.
    """

    kind: ClassVar[str] = "callback"
    runs_on: frozenset[Literal["driver", "trainer", "rollout"]]


@dataclass(frozen=True, kw_only=True)
class RecipeSpec(Spec):
    """A ready run file: `ref` is "package:path/to/file.toml" below that package.

    requires: requirement strings of the distributions it needs, checked before anything starts.
    """

    kind: ClassVar[str] = "recipe"
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[\w./-]+\.toml", self.ref):
            raise ValueError(f"recipe {self.name!r}: ref {self.ref!r} is not 'package:path/to/file.toml'")
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"recipe name {self.name!r} is not kebab-case")
        if not self.summary.strip():
            raise ValueError(f"recipe {self.name!r} has no summary")


@dataclass(frozen=True, kw_only=True)
class CommandSpec(Spec):
    """A command `miles NAME`: `ref` is a `click.Command`, imported when it is called."""

    kind: ClassVar[str] = "command"


Options = Any
"""An instance of a component's options dataclass, or None."""
