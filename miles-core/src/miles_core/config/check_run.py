"""Whether what is the same for the whole run fits together: model, trainer, critic, engine, and where they are.

Every refusal names both sides and says what would mend it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from miles_core.config.check_stage import check_stage
from miles_core.config.model import without_family
from miles_core.config.schema import Plan
from miles_core.config.source import blame
from miles_core.config.traits import kl_weights
from miles_core.config.wording import MODEL, listed, of_stage, origin_of
from miles_core.errors import UserError
from miles_core.plugins import Catalog, Entry, resolve
from miles_core.specs import EngineSpec, ModelSpec, TrainerSpec


def check_run(plan: Plan, config: Mapping[str, Any] | None, family: Entry[ModelSpec] | None, catalog: Catalog) -> None:
    """Refuses a run whose parts do not fit. Raises `UserError`."""
    _check_model(plan, config, family, catalog)
    for stage in plan.stages:
        check_stage(plan, stage, catalog)
    _check_critic(plan, catalog)
    _check_kl(plan)
    _check_evaluation(plan)
    _check_devices(plan)
    _check_publish(plan)
    _check_placement(plan)


# ---- The model and who trains it -------------------------------------------------------------------------------------


def _check_model(
    plan: Plan, config: Mapping[str, Any] | None, family: Entry[ModelSpec] | None, catalog: Catalog
) -> None:
    if config is None:
        return
    trainer = plan.trainer.spec
    if trainer.families == "listed" and family is None:
        raise UserError(
            f"{plan.origins['model.path']}: trainer {trainer.name!r} trains only models that a plugin describes; "
            f"{without_family(config, catalog, trainer.backend)}"
        )
    _check_trainer(plan, "trainer", config, family, catalog)
    if plan.critic is not None:
        _check_trainer(plan, "critic", config, family, catalog)
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and plan.model.max_tokens > longest:
        raise UserError(
            f"{origin_of(plan, None, *MODEL)}: model.max_tokens is {plan.model.max_tokens}, but the model's "
            f"max_position_embeddings is {longest}; set model.max_tokens to {longest} or less"
        )


def _check_trainer(
    plan: Plan,
    part: Literal["trainer", "critic"],
    config: Mapping[str, Any],
    family: Entry[ModelSpec] | None,
    catalog: Catalog,
) -> None:
    """What the check of the policy's or the critic's trainer refuses, and a model that its family cannot describe for
    the trainer's backend."""
    trained = plan.trainer if part == "trainer" else plan.critic
    assert trained is not None
    trainer, description, world_size, policy = trained.spec, None, plan.trainer_section.world_size, None
    if part == "critic" and plan.critic_section is not None:
        world_size = plan.critic_section.world_size or world_size
        policy = plan.trainer.options if plan.critic_section.shares and trainer == plan.trainer.spec else None
    if trainer.backend is not None and family is not None:
        description = _description(plan, trainer, config, family, catalog)
    if trainer.check is None:
        return
    check, folder = resolve(trainer.check), _folder(plan)
    try:
        check(trained.options, config, description, world_size, policy, folder)
    except ValueError as error:
        if folder is not None and str(error).startswith(str(folder)):
            raise UserError(f"{plan.origins['model.path']}: model folder {error}") from error
        named = {name: origin for name, origin in plan.origins.items() if f"{part}." in name and origin != "default"}
        given = {name.rpartition(".")[2]: origin for name, origin in named.items()}
        where = blame(str(error), given) or plan.origins[f"{part}.name"]
        raise UserError(f"{where}: {'of the critic: ' if part == 'critic' else ''}{error}") from error


def _folder(plan: Plan) -> Path | None:
    """The run's model, if it is a folder."""
    folder = Path(plan.model.path or "").expanduser()
    return folder if plan.model.path is not None and folder.is_dir() else None


def _description(
    plan: Plan, trainer: TrainerSpec, config: Mapping[str, Any], family: Entry[ModelSpec], catalog: Catalog
) -> Any:
    where = origin_of(plan, None, "model.path", "model.family")
    ref = family.spec.backends.get(trainer.backend or "")
    if ref is None:
        able = [e.spec.name for e in catalog.all(ModelSpec) if trainer.backend in e.spec.backends]
        raise UserError(
            f"{where}: model family {family.spec.name!r} does not describe itself for {trainer.backend!r}, which "
            f"trainer {trainer.name!r} needs; families that do: {', '.join(able) or 'none'}"
        )
    describe = resolve(ref)
    try:
        return describe(config)
    except (KeyError, ValueError) as error:
        said = f"config.json lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{where}: model family {family.spec.name!r}: {said}") from error


def _check_critic(plan: Plan, catalog: Catalog) -> None:
    """Its trainer has critics, and on the policy's ranks it is the policy's trainer."""
    if plan.critic is None or plan.critic_section is None:
        return
    spec, where = plan.critic.spec, origin_of(plan, None, "critic.name", "trainer.name")
    if spec.critic is None:
        known = listed(entry.spec.name for entry in catalog.all(TrainerSpec) if entry.spec.critic)
        raise UserError(f"{where}: trainer {spec.name!r} has no critic; set critic.name to one that has: {known}")
    if plan.critic_section.shares and spec != plan.trainer.spec:
        raise UserError(
            f"{where}: the critic's trainer is {spec.name!r} and the policy's {plan.trainer.spec.name!r}, so they "
            "cannot share ranks; set critic.ranks or critic.gpus"
        )


def _check_kl(plan: Plan) -> None:
    """What is adapted is one weight. A stage that weighs no divergence has nothing to adapt, unless all are like it."""
    adapting = [stage for stage in plan.stages if stage.kl.target is not None]
    if adapting and not any(map(kl_weights, adapting)):
        raise UserError(
            f"{origin_of(plan, adapting[0], 'kl.target')}: kl.target adapts the weight of the KL divergence to the "
            "reference, but there is none; set the kl_coef that it begins with, of the advantage or of the loss"
        )
    for stage in adapting:
        samples = stage.schedule.prompts_per_step * stage.schedule.samples_per_prompt
        if stage.kl.horizon < samples:
            raise UserError(
                f"{origin_of(plan, stage, 'kl.horizon', 'kl.target')}: kl.horizon{of_stage(plan, stage)} is "
                f"{stage.kl.horizon}, less than the {samples} samples of a step; raise it"
            )
        if len(found := kl_weights(stage)) > 1:
            both = " and ".join(f"{where}.{option}" for where, option in found)
            raise UserError(
                f"{origin_of(plan, stage, 'kl.target')}: kl.target{of_stage(plan, stage)} adapts the weight of the KL "
                f"divergence to the reference, but {both} both weigh it; set one of them to 0"
            )


# ---- Evaluation, devices, publishing ---------------------------------------------------------------------------------


def _check_evaluation(plan: Plan) -> None:
    if plan.evaluation.every and not any(stage.rollout.spec.engine for stage in plan.stages):
        raise UserError(
            f"{plan.origins['evaluation.every']}: evaluation needs a rollout that generates, but no stage has one "
            f"({', '.join(repr(stage.rollout.spec.name) for stage in plan.stages)}); set evaluation.every = 0"
        )


def _check_devices(plan: Plan) -> None:
    parts: list[tuple[str, TrainerSpec | EngineSpec, int]]
    parts = [("trainer", plan.trainer.spec, plan.trainer_section.gpus)]
    if plan.critic is not None and plan.critic_section is not None and not plan.critic_section.shares:
        parts.append(("critic", plan.critic.spec, plan.critic_section.gpus))
    if plan.engine is not None and plan.engine_section is not None:
        parts.append(("engine", plan.engine.spec, plan.engine_section.gpus))
    if plan.teacher is not None:
        parts.append(("teacher.engine", plan.teacher.engine.spec, plan.teacher.engine_section.gpus))
    for key, spec, gpus in parts:
        device = "cuda" if gpus else "cpu"
        if device not in spec.devices:
            mend = f"set {key}.gpus = 0" if gpus else f"set {key}.gpus to 1 or more"
            where = origin_of(plan, None, f"{key}.gpus", f"{key}.name")
            raise UserError(
                f"{where}: {spec.kind} {spec.name!r} runs on {listed(spec.devices)}, but {key}.gpus is {gpus}; {mend}, "
                f"or choose another {spec.kind}"
            )


def _check_publish(plan: Plan) -> None:
    if plan.engine is None:
        return
    if plan.publish.mode not in plan.engine.spec.pause_modes:
        raise UserError(
            f"{origin_of(plan, None, 'publish.mode', 'engine.name')}: publish.mode is {plan.publish.mode!r}, but "
            f"engine {plan.engine.spec.name!r} can only pause by {listed(plan.engine.spec.pause_modes)}; choose one of "
            "these"
        )


def _check_placement(plan: Plan) -> None:
    """Who shares GPUs has as many of them, and waits for the other."""
    if plan.placement.layout != "colocated":
        return
    where = plan.origins["placement.layout"]
    engine, trainer = plan.engine_section, plan.trainer_section
    if engine is None:
        raise UserError(f'{where}: placement.layout is "colocated", but the run has no engine; remove it')
    if bool(engine.gpus) != bool(trainer.gpus):
        raise UserError(
            f'{where}: placement.layout is "colocated", but trainer.gpus is {trainer.gpus} and engine.gpus is '
            f"{engine.gpus}; give both GPUs, or neither"
        )
    if trainer.world_size != engine.count * max(engine.gpus, 1):
        have, mend = f"there are {engine.count} engines", "engine.count = trainer.ranks"
        if engine.gpus:
            have = f"the engines have {engine.count} x {engine.gpus} GPUs"
            mend = "trainer.gpus = engine.count x engine.gpus"
        raise UserError(
            f'{where}: placement.layout is "colocated", but the trainer has {trainer.world_size} ranks and {have}; '
            f"set {mend}"
        )
    _check_turns(plan)


def _check_turns(plan: Plan) -> None:
    """An engine that sleeps cannot generate ahead."""
    for stage in plan.stages:
        if plan.placement.takes_turns and stage.schedule.max_staleness:
            raise UserError(
                f"{origin_of(plan, stage, 'schedule.max_staleness', 'placement.layout')}: schedule.max_staleness"
                f"{of_stage(plan, stage)} is {stage.schedule.max_staleness}, but colocated engines sleep while the "
                "trainer works; set it to 0, or placement.sleep to false if the memory is enough for both"
            )
