"""What refusals have in common: where a value was said, and what is offered instead."""

from __future__ import annotations

from collections.abc import Iterable

from miles_core.config.schema import Plan, Stage
from miles_core.plugins import Catalog
from miles_core.specs import AdvantageSpec, EngineSpec, LossSpec

MODEL = ("model.max_tokens", "model.path", "model.family")
"""What says which model it is, and how long its texts may be."""


def origin_of(plan: Plan, stage: Stage | None, *names: str) -> str:
    """The origin of the first of these values that somebody wrote, the stage's own before the run's."""
    origins = [
        plan.origins.get(f"stages.{stage.name}.{name}" if stage and "stages" in plan.values else name, "default")
        for name in names
    ]
    return next((origin for origin in origins if origin != "default"), "default")


def of_stage(plan: Plan, stage: Stage) -> str:
    """What a message says after a component of a stage: nothing where there is but one stage."""
    return f" of stage {stage.name!r}" if "stages" in plan.values else ""


def listed(names: Iterable[str]) -> str:
    """Names in a sentence."""
    return ", ".join(sorted(names)) or "nothing"


def critic_loss_line(catalog: Catalog) -> str:
    """The line of a run file that says what trains a critic."""
    names = sorted(entry.spec.name for entry in catalog.all(LossSpec) if entry.spec.trains == "critic")
    return f"loss = {' or '.join(map(repr, names)) or '…'}".replace("'", '"')


def no_critic(catalog: Catalog) -> str:
    """What to say where a critic is needed and there is none."""
    return f"there is none; add [critic] with {critic_loss_line(catalog)}"


def reading_values(catalog: Catalog) -> str:
    """The advantages that need a critic, as a list in words."""
    return listed(entry.spec.name for entry in catalog.all(AdvantageSpec) if "values" in entry.spec.needs)


def scoring(catalog: Catalog) -> str:
    """The engines that can serve a teacher, as a list in words."""
    return listed(entry.spec.name for entry in catalog.all(EngineSpec) if "scores" in entry.spec.features)
