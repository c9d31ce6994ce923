"""Which processes a run has, and about how much memory the model takes in each, without torch and without a GPU.

Per rank of the trainer, P parameters over R ranks take 4 P / R bytes each for weights, gradients and the two moments
of AdamW, all float32, and 4 P / R more where a frozen reference is kept. (Mixed precision takes as much: 2 + 2 + 4 + 8
bytes a parameter.) A critic takes about as much as a policy, on the trainer's ranks or its own. An engine over G GPUs
holds P / G weights of its dtype, and keys and values of

    2 * layers * key-value heads * head dimension * bytes

a token, for the samples of one step at their full length. Activations, logits and the libraries' own memory are left
out: they depend on the implementation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles_core.config.model import architectures, find_family, load_family, read_config
from miles_core.config.schema import ModelSection, Plan, Stage, Teacher
from miles_core.config.teacher import teacher_config
from miles_core.config.traits import stage_columns
from miles_core.plugins import Catalog

FLOAT32 = 4
_DTYPES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Like processes. gpus, threads: of each. memory: what it is for -> bytes in each; empty if there is no model in
    it, or if `Estimate.unknown` says why nothing can be said."""

    name: str
    count: int = 1
    gpus: int = 0
    threads: int = 1
    memory: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """parameters: of the model. unknown: why memory cannot be estimated, else ""."""

    processes: tuple[Processes, ...]
    parameters: int | None
    unknown: str = ""


def estimate(plan: Plan, catalog: Catalog) -> Estimate:
    """The processes of a plan and the memory that the model takes in them."""
    config = read_config(plan.model, plan.origins, catalog)
    parameters, unknown = _parameters(plan.model, config, plan.origins, catalog)
    processes = [Processes(name="driver", memory={}), Processes(name="collector", memory={})]
    if plan.engine_section is not None:
        engine = plan.engine_section
        memory = _engine_memory(plan, config, parameters) if config and parameters else {}
        processes.append(
            Processes(name="engine", count=engine.count, gpus=engine.gpus, threads=engine.threads, memory=memory)
        )
    trainer = plan.trainer_section
    processes.append(
        Processes(
            name="trainer rank",
            count=trainer.world_size,
            gpus=1 if trainer.gpus else 0,
            threads=trainer.threads,
            memory=_trainer_memory(plan, parameters) if parameters else {},
        )
    )
    if (critic := plan.critic_section) is not None and not critic.shares:
        memory = _trained(parameters, critic.world_size) if parameters else {}
        gpus = 1 if critic.gpus else 0
        processes.append(
            Processes(name="critic rank", count=critic.world_size, gpus=gpus, threads=critic.threads, memory=memory)
        )
    if plan.teacher is not None:
        processes.append(_teacher(plan, plan.teacher, catalog))
    return Estimate(processes=tuple(processes), parameters=parameters, unknown=unknown)


def _teacher(plan: Plan, teacher: Teacher, catalog: Catalog) -> Processes:
    """The teacher's engines, which hold its weights and keep no keys and values."""
    engine, config = teacher.engine_section, teacher_config(teacher, plan.origins)
    model, origins = ModelSection(path=teacher.section.path), {"model.path": plan.origins["teacher.path"]}
    parameters, _ = _parameters(model, config, origins, catalog)
    size = _DTYPES[teacher.section.dtype]
    memory = {"weights": math.ceil(size * parameters / max(engine.gpus, 1))} if parameters else {}
    return Processes(name="teacher", count=engine.count, gpus=engine.gpus, threads=engine.threads, memory=memory)


def _parameters(
    model: ModelSection, config: Mapping[str, Any] | None, origins: Mapping[str, str], catalog: Catalog
) -> tuple[int | None, str]:
    """The number of parameters, or why it is unknown."""
    if config is None:
        return None, f"{model.path} is not on this machine yet"
    family = find_family(model, config, origins, catalog)
    if family is None:
        return None, f"no installed model plugin covers {architectures(config)}"
    try:
        return load_family(family).parameters(config), ""
    except (KeyError, TypeError, ValueError) as error:  # a config.json that its own family cannot read
        return None, f"model family {family.spec.name!r} cannot count this config.json: {type(error).__name__}: {error}"


def _trainer_memory(plan: Plan, parameters: int) -> dict[str, int]:
    memory = _trained(parameters, plan.trainer_section.world_size)
    if any("ref_logprobs" in stage_columns(stage) for stage in plan.stages):
        memory["reference weights"] = memory["weights"]
    if plan.critic_section is not None and plan.critic_section.shares:
        critic = _trained(parameters, plan.trainer_section.world_size)
        memory |= {f"critic's {what}": size for what, size in critic.items()}
    return memory


def _trained(parameters: int, ranks: int) -> dict[str, int]:
    """A model with its gradients and moments, sharded."""
    share = math.ceil(FLOAT32 * parameters / ranks)
    return {"weights": share, "gradients": share, "AdamW moments": 2 * share}


def _engine_memory(plan: Plan, config: Mapping[str, Any], parameters: int) -> dict[str, int]:
    assert plan.engine_section is not None
    gpus = max(plan.engine_section.gpus, 1)
    size = _DTYPES[plan.model.dtype]
    memory = {"weights": math.ceil(size * parameters / gpus)}
    elements = _cache_elements(config)
    if elements is not None:
        sequences = math.ceil(max(map(_generated, plan.stages)) / plan.engine_section.count)
        what = f"keys and values of {sequences} x {plan.model.max_tokens} tokens"
        memory[what] = math.ceil(size * elements * sequences * plan.model.max_tokens / gpus)
    return memory


def _generated(stage: Stage) -> int:
    """Samples that a step of a stage generates."""
    return stage.schedule.prompts_per_step * stage.schedule.samples_per_prompt if stage.rollout.spec.engine else 0


def _cache_elements(config: Mapping[str, Any]) -> int | None:
    """Numbers that attention keeps of one token; None if config.json does not say."""
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        return 2 * layers * int(config.get("num_key_value_heads") or heads) * dim
    except (KeyError, TypeError, ValueError):
        return None


def readable(size: int) -> str:
    """Bytes in the largest fitting binary unit, three digits: "1.42 GiB"."""
    amount, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.3g} {units[0]}"
