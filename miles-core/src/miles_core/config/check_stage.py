"""Whether the components of a stage fit together. Every refusal names both sides and says what would mend it."""

from __future__ import annotations

from miles_core.config.schema import Plan, Stage
from miles_core.config.source import blame
from miles_core.config.traits import (
    ALWAYS,
    TEACHER,
    Reader,
    needed_columns,
    reads_rewards,
    stage_columns,
    top_k,
)
from miles_core.config.wording import (
    MODEL,
    critic_loss_line,
    listed,
    no_critic,
    of_stage,
    origin_of,
    reading_values,
    scoring,
)
from miles_core.errors import UserError
from miles_core.plugins import Catalog, resolve
from miles_core.specs import TrainerSpec


def check_stage(plan: Plan, stage: Stage, catalog: Catalog) -> None:
    """Refuses a stage whose parts do not fit. Raises `UserError`."""
    _check_engine(plan, stage)
    _check_losses(plan, stage, catalog)
    _check_columns(plan, stage, catalog)
    _check_groups(plan, stage)
    _check_baseline(plan, stage)
    _check_rewards(plan, stage)
    _check_lengths(plan, stage)
    _check_data(plan, stage)


# ---- Losses and the columns that they read --------------------------------------------------------------------------


def _check_losses(plan: Plan, stage: Stage, catalog: Catalog) -> None:
    """The stage's loss trains a policy, with a critic if it must have one; the critic's trains a critic."""
    spec = stage.loss.spec
    where, loss = origin_of(plan, stage, "loss.name"), f"loss {spec.name!r}{of_stage(plan, stage)}"
    if spec.trains == "critic":
        raise UserError(f"{where}: {loss} trains a critic and no policy; it is for critic.loss")
    if spec.trains == "actor" and plan.critic is None:
        raise UserError(f"{where}: {loss} trains a policy beside a critic, but {no_critic(catalog)}")
    if spec.trains == "actor" and stage.critic is None:
        advantage = f"advantage {stage.advantage.spec.name!r} reads" if stage.advantage else "no advantage reads"
        raise UserError(
            f"{where}: {loss} trains a policy beside a critic, but {advantage} no values; choose an advantage that "
            f"reads them ({reading_values(catalog)}), or a loss that needs no critic"
        )
    if stage.critic is None:
        return
    critic, where = stage.critic.loss.spec, origin_of(plan, stage, "critic.loss.name")
    if critic.trains != "critic":
        raise UserError(
            f"{where}: critic.loss {critic.name!r}{of_stage(plan, stage)} trains a policy and no critic; "
            f"say {critic_loss_line(catalog)}"
        )
    if stage.critic.warmup_steps >= stage.schedule.steps:
        raise UserError(
            f"{origin_of(plan, stage, 'critic.warmup_steps')}: critic.warmup_steps{of_stage(plan, stage)} is "
            f"{stage.critic.warmup_steps}, which leaves the policy none of its {stage.schedule.steps} steps; lower it"
        )


def _check_columns(plan: Plan, stage: Stage, catalog: Catalog) -> None:
    trainer = stage.trainer.spec
    given = ALWAYS | trainer.gives | ({"values"} if plan.critic else set()) | (TEACHER if plan.teacher else set())
    _check_taught(plan, stage, catalog)
    givers = f"trainer {trainer.name!r} gives {listed(trainer.gives)}"
    read: list[tuple[str, Reader]] = [("loss", stage.loss)]
    read += [(f"corrections.{place}", each) for place, each in enumerate(stage.corrections)]
    if stage.critic is not None:
        read.append(("critic.loss", stage.critic.loss))
    if stage.advantage is not None:
        if "values" in (missing := needed_columns(stage.advantage) - given):
            raise _no_values(plan, stage, catalog)
        if missing:
            raise _lack(plan, stage, "advantage", stage.advantage, missing, givers)
        given |= stage.advantage.spec.gives
        givers = f"advantage {stage.advantage.spec.name!r} gives {listed(stage.advantage.spec.gives)}, {givers}"
    else:
        givers = f"there is no advantage, {givers}"
    for key, component in read:
        if missing := needed_columns(component) - given:
            raise _lack(plan, stage, key, component, missing, givers)


def _check_taught(plan: Plan, stage: Stage, catalog: Catalog) -> None:
    """Who listens to a teacher has one, and a trainer that can compare with it."""
    listening: list[tuple[str, Reader]] = [("loss", stage.loss)]
    if stage.advantage is not None:
        listening.append(("advantage", stage.advantage))
    for key, one in listening:
        if plan.teacher is None and needed_columns(one) & TEACHER:
            who = f"{one.spec.kind} {one.spec.name!r}{of_stage(plan, stage)}"
            raise UserError(
                f"{origin_of(plan, stage, f'{key}.name')}: {who} learns from a teacher, but there is none; add "
                f"[teacher] with a path and an engine that scores ({scoring(catalog)})"
            )
    trainer = stage.trainer.spec
    if top_k(stage) and not trainer.top_logprobs:
        able = [entry.spec.name for entry in catalog.all(TrainerSpec) if entry.spec.top_logprobs]
        raise UserError(
            f"{origin_of(plan, stage, 'loss.name')}: loss {stage.loss.spec.name!r}{of_stage(plan, stage)} compares "
            f"whole distributions, which trainer {trainer.name!r} does not give; trainers that do: {listed(able)}"
        )


def _no_values(plan: Plan, stage: Stage, catalog: Catalog) -> UserError:
    assert stage.advantage is not None
    return UserError(
        f"{origin_of(plan, stage, 'advantage.name')}: advantage {stage.advantage.spec.name!r}{of_stage(plan, stage)} "
        f"needs values, which a critic gives, but {no_critic(catalog)}"
    )


def _lack(plan: Plan, stage: Stage, key: str, component: Reader, missing: frozenset[str], givers: str) -> UserError:
    spec = component.spec
    options = sorted(option for column, option in spec.needs_if.items() if column in missing - spec.needs)
    switch = f", or switch off {listed(f'{key}.{option}' for option in options)}" if options else ""
    return UserError(
        f"{origin_of(plan, stage, f'{key}.name')}: {spec.kind} {spec.name!r}{of_stage(plan, stage)} needs "
        f"{listed(missing)}, but {givers}; choose an advantage or a trainer that gives it{switch}"
    )


# ---- Groups and rewards ---------------------------------------------------------------------------------------------


def _check_groups(plan: Plan, stage: Stage) -> None:
    if stage.advantage is None:
        return
    if stage.advantage.spec.groups and stage.schedule.samples_per_prompt < 2:
        where = origin_of(plan, stage, "schedule.samples_per_prompt", "advantage.name")
        raise UserError(
            f"{where}: advantage {stage.advantage.spec.name!r}"
            f"{of_stage(plan, stage)} compares the samples of one prompt, but schedule.samples_per_prompt is "
            f"{stage.schedule.samples_per_prompt}; set it to 2 or more"
        )


def _check_baseline(plan: Plan, stage: Stage) -> None:
    """Samples that are only there to be compared with need both: who makes them and who reads them."""
    if stage.advantage is None:
        return
    if stage.advantage.spec.baseline == stage.rollout.spec.baseline:
        return
    advantage, rollout = f"advantage {stage.advantage.spec.name!r}", f"rollout {stage.rollout.spec.name!r}"
    if stage.advantage.spec.baseline:
        problem = f"{advantage}{of_stage(plan, stage)} compares with a baseline sample, but {rollout} makes none"
    else:
        problem = f"{rollout}{of_stage(plan, stage)} makes a baseline sample, but {advantage} does not compare with it"
    raise UserError(f"{origin_of(plan, stage, 'advantage.name')}: {problem}; choose two that fit")


def _check_rewards(plan: Plan, stage: Stage) -> None:
    if not stage.rollout.spec.engine and stage.advantage is None:
        return
    if not stage.rewards and not _needs_no_reward(plan, stage):
        raise UserError(
            f"{origin_of(plan, stage, 'reward', 'rollout.name', 'data.name')}: rollout {stage.rollout.spec.name!r}"
            f"{of_stage(plan, stage)} makes samples that must be scored, but there is no reward; add [reward] with a "
            "name"
        )
    for index, (reward, _) in enumerate(stage.rewards):
        if reward.spec.needs_answer and not stage.data.spec.answers:
            raise UserError(
                f"{origin_of(plan, stage, f'reward.{index}.name')}: reward {reward.spec.name!r}{of_stage(plan, stage)} "
                f"compares with a reference answer, but data source {stage.data.spec.name!r} gives none; choose "
                "another reward, or data with answers"
            )


def _needs_no_reward(plan: Plan, stage: Stage) -> bool:
    """Whether a teacher's word is enough."""
    rewarded = stage.advantage is not None and reads_rewards(stage.advantage)
    taught = bool(stage_columns(stage) & TEACHER)
    return taught and not rewarded and not stage.filters and not plan.evaluation.every


# ---- Generation and data --------------------------------------------------------------------------------------------


def _check_engine(plan: Plan, stage: Stage) -> None:
    if stage.rollout.spec.engine and plan.engine is None:
        raise UserError(
            f"{origin_of(plan, stage, 'rollout.name', 'data.name')}: rollout {stage.rollout.spec.name!r}"
            f"{of_stage(plan, stage)} generates, but there is no engine; add [engine] with a name"
        )


def _check_lengths(plan: Plan, stage: Stage) -> None:
    if stage.sampling.max_new_tokens >= plan.model.max_tokens:
        wrote = origin_of(plan, stage, "sampling.max_new_tokens")
        where = wrote if wrote != "default" else origin_of(plan, None, *MODEL)
        raise UserError(
            f"{where}: sampling.max_new_tokens{of_stage(plan, stage)} is "
            f"{stage.sampling.max_new_tokens}, which leaves no room for a prompt within model.max_tokens = "
            f"{plan.model.max_tokens}; lower the one or raise the other"
        )


def _check_data(plan: Plan, stage: Stage) -> None:
    """What the check of the stage's data source refuses."""
    if stage.data.spec.check is None:
        return
    check = resolve(stage.data.spec.check)
    try:
        check(stage.data.options)
    except ValueError as error:
        section = f"stages.{stage.name}.data." if "stages" in plan.values else "data."
        given = {name.removeprefix(section): said for name, said in plan.origins.items() if name.startswith(section)}
        named = {option: origin for option, origin in given.items() if origin != "default"}
        leaves = {name.rpartition(".")[2]: origin for name, origin in named.items()}
        raise UserError(f"{blame(str(error), leaves) or given['name']}: {error}") from error
