"""Whether the components of a run fit together, by the traits of their records and never by their names.

Every refusal names both sides and says what would mend it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from miles_core.config.model import without_family
from miles_core.config.schema import Component, Plan, Stage
from miles_core.config.source import blame
from miles_core.errors import UserError
from miles_core.plugins import Catalog, Entry, resolve
from miles_core.specs import (
    AdvantageSpec,
    CorrectionSpec,
    DataSourceSpec,
    EngineSpec,
    LossSpec,
    ModelSpec,
    RewardSpec,
    RolloutSpec,
    TrainerSpec,
)

ALWAYS = frozenset({"tokens", "mask", "rollout_logprobs", "versions", "weights"})
"""Token columns that every batch has."""

TEACHER = frozenset({"teacher_logprobs", "teacher_top_tokens", "teacher_top_logprobs"})
"""Token columns that a teacher gives."""

_MODEL = ("model.max_tokens", "model.path", "model.family")


def needed_columns(component: Component) -> frozenset[str]:
    """The token columns that a loss, a correction or an advantage reads with the options it has."""
    spec = component.spec
    assert isinstance(spec, (LossSpec, CorrectionSpec, AdvantageSpec))
    asked = {column for column, option in spec.needs_if.items() if bool(operator.attrgetter(option)(component.options))}
    return spec.needs | asked


_IN_PLACE_OF_OLD = {
    "recompute": frozenset({"old_logprobs"}),
    "rollout": frozenset({"rollout_logprobs"}),
    "interpolate": frozenset({"rollout_logprobs", "staleness"}),
}
"""What a loss's old log-probabilities are made of, by loss.old_policy."""


def loss_columns(stage: Stage) -> frozenset[str]:
    """The token columns that a stage's loss and its corrections read."""
    read: frozenset[str] = frozenset().union(*map(needed_columns, [stage.loss, *stage.corrections]))
    if "old_logprobs" in read:
        read = read - {"old_logprobs"} | _IN_PLACE_OF_OLD[stage.loss_section.old_policy]
    return read


def stage_columns(stage: Stage) -> frozenset[str]:
    """The token columns that anything in a stage reads."""
    return loss_columns(stage) | (needed_columns(stage.advantage) if stage.advantage is not None else frozenset())


def reads_advantage(readers: Iterable[Component], trainer: Component) -> bool:
    """Whether a loss and its corrections need more than a batch has without an advantage."""
    return not frozenset().union(*map(needed_columns, readers)) <= ALWAYS | TEACHER | _trainer_spec(trainer).gives


def reads_rewards(advantage: Component) -> bool:
    """Whether an advantage reads rewards with the options it has."""
    assert isinstance(advantage.spec, AdvantageSpec)
    option = advantage.spec.rewards_if
    return option is None or bool(operator.attrgetter(option)(advantage.options))


def top_k(stage: Stage) -> int:
    """How many of the teacher's likeliest tokens the stage's loss reads; 0 if it reads none."""
    option = _loss_spec(stage.loss).top_k
    return 0 if option is None else int(operator.attrgetter(option)(stage.loss.options))


def reads_values(advantage: Component) -> bool:
    """Whether an advantage needs a critic."""
    return "values" in needed_columns(advantage)


KLWeight = tuple[Literal["advantage", "loss"], str]
"""Which of the two weighs the KL divergence to the reference, and by which option."""


def kl_weights(stage: Stage) -> list[KLWeight]:
    """What weighs the KL divergence to the reference in a stage."""
    places: list[tuple[Literal["advantage", "loss"], Component]] = [("loss", stage.loss)]
    if stage.advantage is not None:
        places.insert(0, ("advantage", stage.advantage))
    found: list[KLWeight] = []
    for where, component in places:
        assert isinstance(component.spec, (AdvantageSpec, LossSpec))
        option = component.spec.kl_coef
        if option is not None and getattr(component.options, option):
            found.append((where, option))
    return found


def generates(rollout: Component) -> bool:
    """Whether a policy writes a rollout's responses, so that there are rollout log-probabilities to correct for."""
    assert isinstance(rollout.spec, RolloutSpec)
    return rollout.spec.engine


def check(plan: Plan, config: Mapping[str, Any] | None, family: Entry[ModelSpec] | None, catalog: Catalog) -> None:
    """Refuses a run whose parts do not fit. Raises `UserError`."""
    _check_model(plan, config, family, catalog)
    for stage in plan.stages:
        _check_engine(plan, stage)
        _check_losses(plan, stage, catalog)
        _check_columns(plan, stage, catalog)
        _check_groups(plan, stage)
        _check_baseline(plan, stage)
        _check_rewards(plan, stage)
        _check_lengths(plan, stage)
    _check_critic(plan, catalog)
    _check_kl(plan)
    _check_evaluation(plan)
    _check_devices(plan)
    _check_publish(plan)
    _check_placement(plan)


def _where(plan: Plan, stage: Stage | None, *names: str) -> str:
    """The origin of the first of these values that somebody wrote, the stage's own before the run's."""
    origins = [
        plan.origins.get(f"stages.{stage.name}.{name}" if stage and "stages" in plan.values else name, "default")
        for name in names
    ]
    return next((origin for origin in origins if origin != "default"), "default")


def _trainer_spec(trainer: Component) -> TrainerSpec:
    assert isinstance(trainer.spec, TrainerSpec)
    return trainer.spec


def _in(plan: Plan, stage: Stage) -> str:
    return f" of stage {stage.name!r}" if "stages" in plan.values else ""


# ---- Policy and critic ---------------------------------------------------------------------------------------------


def _check_losses(plan: Plan, stage: Stage, catalog: Catalog) -> None:
    """The stage's loss trains a policy, with a critic if it must have one; the critic's trains a critic."""
    spec = _loss_spec(stage.loss)
    where, loss = _where(plan, stage, "loss.name"), f"loss {spec.name!r}{_in(plan, stage)}"
    if spec.trains == "critic":
        raise UserError(f"{where}: {loss} trains a critic and no policy; it is for critic.loss")
    if spec.trains == "actor" and plan.critic is None:
        raise UserError(f"{where}: {loss} trains a policy beside a critic, but {_no_critic(catalog)}")
    if spec.trains == "actor" and stage.critic is None:
        advantage = f"advantage {stage.advantage.spec.name!r} reads" if stage.advantage else "no advantage reads"
        raise UserError(
            f"{where}: {loss} trains a policy beside a critic, but {advantage} no values; choose an advantage that "
            f"reads them ({reading_values(catalog)}), or a loss that needs no critic"
        )
    if stage.critic is None:
        return
    critic, where = _loss_spec(stage.critic.loss), _where(plan, stage, "critic.loss.name")
    if critic.trains != "critic":
        raise UserError(
            f"{where}: critic.loss {critic.name!r}{_in(plan, stage)} trains a policy and no critic; "
            f"say {critic_loss_line(catalog)}"
        )
    if stage.critic.warmup_steps >= stage.schedule.steps:
        raise UserError(
            f"{_where(plan, stage, 'critic.warmup_steps')}: critic.warmup_steps{_in(plan, stage)} is "
            f"{stage.critic.warmup_steps}, which leaves the policy none of its {stage.schedule.steps} steps; lower it"
        )


def _check_critic(plan: Plan, catalog: Catalog) -> None:
    """Its trainer has critics, and on the policy's ranks it is the policy's trainer."""
    if plan.critic is None or plan.critic_section is None:
        return
    spec, where = _trainer_spec(plan.critic), _where(plan, None, "critic.name", "trainer.name")
    if spec.critic is None:
        known = _listed(entry.spec.name for entry in catalog.all(TrainerSpec) if entry.spec.critic)
        raise UserError(f"{where}: trainer {spec.name!r} has no critic; set critic.name to one that has: {known}")
    if plan.critic_section.shares and spec != plan.trainer.spec:
        raise UserError(
            f"{where}: the critic's trainer is {spec.name!r} and the policy's {plan.trainer.spec.name!r}, so they "
            "cannot share ranks; set critic.ranks or critic.gpus"
        )


def _loss_spec(loss: Component) -> LossSpec:
    assert isinstance(loss.spec, LossSpec)
    return loss.spec


def critic_loss_line(catalog: Catalog) -> str:
    """The line of a run file that says what trains a critic."""
    names = sorted(entry.spec.name for entry in catalog.all(LossSpec) if entry.spec.trains == "critic")
    return f"loss = {' or '.join(map(repr, names)) or '…'}".replace("'", '"')


def _no_critic(catalog: Catalog) -> str:
    return f"there is none; add [critic] with {critic_loss_line(catalog)}"


def reading_values(catalog: Catalog) -> str:
    """The advantages that need a critic, as a list in words."""
    return _listed(entry.spec.name for entry in catalog.all(AdvantageSpec) if "values" in entry.spec.needs)


# ---- Columns, groups, rewards --------------------------------------------------------------------------------------


def _check_columns(plan: Plan, stage: Stage, catalog: Catalog) -> None:
    trainer = _trainer_spec(stage.trainer)
    given = ALWAYS | trainer.gives | ({"values"} if plan.critic else set()) | (TEACHER if plan.teacher else set())
    _check_taught(plan, stage, catalog)
    givers = f"trainer {trainer.name!r} gives {_listed(trainer.gives)}"
    read = [("loss", stage.loss), *((f"corrections.{place}", each) for place, each in enumerate(stage.corrections))]
    if stage.critic is not None:
        read.append(("critic.loss", stage.critic.loss))
    if stage.advantage is not None:
        assert isinstance(stage.advantage.spec, AdvantageSpec)
        if "values" in (missing := needed_columns(stage.advantage) - given):
            raise _no_values(plan, stage, catalog)
        if missing:
            raise _lack(plan, stage, "advantage", stage.advantage, missing, givers)
        given |= stage.advantage.spec.gives
        givers = f"advantage {stage.advantage.spec.name!r} gives {_listed(stage.advantage.spec.gives)}, {givers}"
    else:
        givers = f"there is no advantage, {givers}"
    for key, component in read:
        if missing := needed_columns(component) - given:
            raise _lack(plan, stage, key, component, missing, givers)


def _check_taught(plan: Plan, stage: Stage, catalog: Catalog) -> None:
    """Who listens to a teacher has one, and a trainer that can compare with it."""
    listening = [("loss", stage.loss), *([("advantage", stage.advantage)] if stage.advantage else [])]
    for key, one in listening:
        if plan.teacher is None and needed_columns(one) & TEACHER:
            who = f"{one.spec.kind} {one.spec.name!r}{_in(plan, stage)}"
            raise UserError(
                f"{_where(plan, stage, f'{key}.name')}: {who} learns from a teacher, but there is none; add [teacher] "
                f"with a path and an engine that scores ({scoring(catalog)})"
            )
    trainer = _trainer_spec(stage.trainer)
    if top_k(stage) and not trainer.top_logprobs:
        able = [entry.spec.name for entry in catalog.all(TrainerSpec) if entry.spec.top_logprobs]
        raise UserError(
            f"{_where(plan, stage, 'loss.name')}: loss {stage.loss.spec.name!r}{_in(plan, stage)} compares whole "
            f"distributions, which trainer {trainer.name!r} does not give; trainers that do: {_listed(able)}"
        )


def scoring(catalog: Catalog) -> str:
    """The engines that can serve a teacher, as a list in words."""
    return _listed(entry.spec.name for entry in catalog.all(EngineSpec) if "scores" in entry.spec.features)


def _no_values(plan: Plan, stage: Stage, catalog: Catalog) -> UserError:
    assert stage.advantage is not None
    return UserError(
        f"{_where(plan, stage, 'advantage.name')}: advantage {stage.advantage.spec.name!r}{_in(plan, stage)} needs "
        f"values, which a critic gives, but {_no_critic(catalog)}"
    )


def _lack(plan: Plan, stage: Stage, key: str, component: Component, missing: frozenset[str], givers: str) -> UserError:
    spec = component.spec
    assert isinstance(spec, (LossSpec, CorrectionSpec, AdvantageSpec))
    options = sorted(option for column, option in spec.needs_if.items() if column in missing - spec.needs)
    switch = f", or switch off {_listed(f'{key}.{option}' for option in options)}" if options else ""
    return UserError(
        f"{_where(plan, stage, f'{key}.name')}: {spec.kind} {spec.name!r}{_in(plan, stage)} needs {_listed(missing)}, "
        f"but {givers}; choose an advantage or a trainer that gives it{switch}"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _check_kl(plan: Plan) -> None:
    """What is adapted is one weight. A stage that weighs no divergence has nothing to adapt, unless all are like it."""
    adapting = [stage for stage in plan.stages if stage.kl.target is not None]
    if adapting and not any(map(kl_weights, adapting)):
        raise UserError(
            f"{_where(plan, adapting[0], 'kl.target')}: kl.target adapts the weight of the KL divergence to the "
            "reference, but there is none; set the kl_coef that it begins with, of the advantage or of the loss"
        )
    for stage in adapting:
        samples = stage.schedule.prompts_per_step * stage.schedule.samples_per_prompt
        if stage.kl.horizon < samples:
            raise UserError(
                f"{_where(plan, stage, 'kl.horizon', 'kl.target')}: kl.horizon{_in(plan, stage)} is "
                f"{stage.kl.horizon}, less than the {samples} samples of a step; raise it"
            )
        if len(found := kl_weights(stage)) > 1:
            both = " and ".join(f"{where}.{option}" for where, option in found)
            raise UserError(
                f"{_where(plan, stage, 'kl.target')}: kl.target{_in(plan, stage)} adapts the weight of the KL "
                f"divergence to the reference, but {both} both weigh it; set one of them to 0"
            )


def _check_groups(plan: Plan, stage: Stage) -> None:
    if stage.advantage is None:
        return
    assert isinstance(stage.advantage.spec, AdvantageSpec)
    if stage.advantage.spec.groups and stage.schedule.samples_per_prompt < 2:
        where = _where(plan, stage, "schedule.samples_per_prompt", "advantage.name")
        raise UserError(
            f"{where}: advantage {stage.advantage.spec.name!r}"
            f"{_in(plan, stage)} compares the samples of one prompt, but schedule.samples_per_prompt is "
            f"{stage.schedule.samples_per_prompt}; set it to 2 or more"
        )


def _check_baseline(plan: Plan, stage: Stage) -> None:
    """Samples that are only there to be compared with need both: who makes them and who reads them."""
    if stage.advantage is None:
        return
    assert isinstance(stage.advantage.spec, AdvantageSpec)
    assert isinstance(stage.rollout.spec, RolloutSpec)
    if stage.advantage.spec.baseline == stage.rollout.spec.baseline:
        return
    advantage, rollout = f"advantage {stage.advantage.spec.name!r}", f"rollout {stage.rollout.spec.name!r}"
    if stage.advantage.spec.baseline:
        problem = f"{advantage}{_in(plan, stage)} compares with a baseline sample, but {rollout} makes none"
    else:
        problem = f"{rollout}{_in(plan, stage)} makes a baseline sample, but {advantage} does not compare with it"
    raise UserError(f"{_where(plan, stage, 'advantage.name')}: {problem}; choose two that fit")


def _check_engine(plan: Plan, stage: Stage) -> None:
    assert isinstance(stage.rollout.spec, RolloutSpec)
    if stage.rollout.spec.engine and plan.engine is None:
        raise UserError(
            f"{_where(plan, stage, 'rollout.name', 'data.name')}: rollout {stage.rollout.spec.name!r}"
            f"{_in(plan, stage)} generates, but there is no engine; add [engine] with a name"
        )


def _check_rewards(plan: Plan, stage: Stage) -> None:
    assert isinstance(stage.rollout.spec, RolloutSpec)
    assert isinstance(stage.data.spec, DataSourceSpec)
    if not stage.rollout.spec.engine and stage.advantage is None:
        return
    if not stage.rewards and not _needs_no_reward(plan, stage):
        raise UserError(
            f"{_where(plan, stage, 'reward', 'rollout.name', 'data.name')}: rollout {stage.rollout.spec.name!r}"
            f"{_in(plan, stage)} makes samples that must be scored, but there is no reward; add [reward] with a name"
        )
    for index, (reward, _) in enumerate(stage.rewards):
        assert isinstance(reward.spec, RewardSpec)
        if reward.spec.needs_answer and not stage.data.spec.answers:
            raise UserError(
                f"{_where(plan, stage, f'reward.{index}.name')}: reward {reward.spec.name!r}{_in(plan, stage)} "
                f"compares with a reference answer, but data source {stage.data.spec.name!r} gives none; choose "
                "another reward, or data with answers"
            )


def _needs_no_reward(plan: Plan, stage: Stage) -> bool:
    """Whether a teacher's word is enough."""
    rewarded = stage.advantage is not None and reads_rewards(stage.advantage)
    taught = bool(stage_columns(stage) & TEACHER)
    return taught and not rewarded and not stage.filters and not plan.evaluation.every


# ---- Lengths and the model ------------------------------------------------------------------------------------------


def _check_lengths(plan: Plan, stage: Stage) -> None:
    if stage.sampling.max_new_tokens >= plan.model.max_tokens:
        wrote = _where(plan, stage, "sampling.max_new_tokens")
        where = wrote if wrote != "default" else _where(plan, None, *_MODEL)
        raise UserError(
            f"{where}: sampling.max_new_tokens{_in(plan, stage)} is "
            f"{stage.sampling.max_new_tokens}, which leaves no room for a prompt within model.max_tokens = "
            f"{plan.model.max_tokens}; lower the one or raise the other"
        )


def _check_model(
    plan: Plan, config: Mapping[str, Any] | None, family: Entry[ModelSpec] | None, catalog: Catalog
) -> None:
    if config is None:
        return
    trainer = _trainer_spec(plan.trainer)
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
            f"{_where(plan, None, *_MODEL)}: model.max_tokens is {plan.model.max_tokens}, but the model's "
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
    trainer, description, world_size, policy = _trainer_spec(trained), None, plan.trainer_section.world_size, None
    if part == "critic" and plan.critic_section is not None:
        world_size = plan.critic_section.world_size or world_size
        policy = plan.trainer.options if plan.critic_section.shares and trainer == plan.trainer.spec else None
    if trainer.backend is not None and family is not None:
        description = _description(plan, trainer, config, family, catalog)
    if trainer.check is None:
        return
    try:
        resolve(trainer.check)(trained.options, config, description, world_size, policy)
    except ValueError as error:
        named = {name: origin for name, origin in plan.origins.items() if f"{part}." in name and origin != "default"}
        given = {name.rpartition(".")[2]: origin for name, origin in named.items()}
        where = blame(str(error), given) or plan.origins[f"{part}.name"]
        raise UserError(f"{where}: {'of the critic: ' if part == 'critic' else ''}{error}") from error


def _description(
    plan: Plan, trainer: TrainerSpec, config: Mapping[str, Any], family: Entry[ModelSpec], catalog: Catalog
) -> Any:
    where = _where(plan, None, "model.path", "model.family")
    ref = family.spec.backends.get(trainer.backend or "")
    if ref is None:
        able = [e.spec.name for e in catalog.all(ModelSpec) if trainer.backend in e.spec.backends]
        raise UserError(
            f"{where}: model family {family.spec.name!r} does not describe itself for {trainer.backend!r}, which "
            f"trainer {trainer.name!r} needs; families that do: {', '.join(able) or 'none'}"
        )
    try:
        return resolve(ref)(config)
    except (KeyError, ValueError) as error:
        said = f"config.json lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{where}: model family {family.spec.name!r}: {said}") from error


# ---- Evaluation, devices, publishing ---------------------------------------------------------------------------------


def _check_evaluation(plan: Plan) -> None:
    generates = any(isinstance(stage.rollout.spec, RolloutSpec) and stage.rollout.spec.engine for stage in plan.stages)
    if plan.evaluation.every and not generates:
        raise UserError(
            f"{plan.origins['evaluation.every']}: evaluation needs a rollout that generates, but no stage has one "
            f"({', '.join(repr(stage.rollout.spec.name) for stage in plan.stages)}); set evaluation.every = 0"
        )


def _check_devices(plan: Plan) -> None:
    parts = [("trainer", plan.trainer.spec, plan.trainer_section.gpus)]
    if plan.critic is not None and plan.critic_section is not None and not plan.critic_section.shares:
        parts.append(("critic", plan.critic.spec, plan.critic_section.gpus))
    if plan.engine is not None and plan.engine_section is not None:
        parts.append(("engine", plan.engine.spec, plan.engine_section.gpus))
    for key, spec, gpus in parts:
        assert isinstance(spec, (TrainerSpec, EngineSpec))
        device = "cuda" if gpus else "cpu"
        if device not in spec.devices:
            mend = f"set {key}.gpus = 0" if gpus else f"set {key}.gpus to 1 or more"
            where = _where(plan, None, f"{key}.gpus", f"{key}.name")
            raise UserError(
                f"{where}: {key} {spec.name!r} runs on {_listed(spec.devices)}, but {key}.gpus "
                f"is {gpus}; {mend}, or choose another {key}"
            )


def _check_publish(plan: Plan) -> None:
    if plan.engine is None:
        return
    assert isinstance(plan.engine.spec, EngineSpec)
    if plan.publish.mode not in plan.engine.spec.pause_modes:
        raise UserError(
            f"{_where(plan, None, 'publish.mode', 'engine.name')}: publish.mode is {plan.publish.mode!r}, but engine "
            f"{plan.engine.spec.name!r} can only pause by {_listed(plan.engine.spec.pause_modes)}; choose one of these"
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
                f"{_where(plan, stage, 'schedule.max_staleness', 'placement.layout')}: schedule.max_staleness"
                f"{_in(plan, stage)} is {stage.schedule.max_staleness}, but colocated engines sleep while the trainer "
                "works; set it to 0, or placement.sleep to false if the memory is enough for both"
            )
