"""What each member of a run needs of the cluster."""

from __future__ import annotations

from dataclasses import replace

from miles_core.cluster.session import Place
from miles_core.config.schema import Plan


def places(plan: Plan) -> dict[str, Place]:
    """What each member needs, by its name."""
    trainer, engine = plan.trainer_section, plan.engine_section
    shared = engine is not None and plan.placement.layout == "colocated"
    place = Place(cpus=trainer.threads, gpus=int(trainer.gpus > 0))
    found = {f"trainer {rank}": place for rank in range(trainer.world_size)}
    if engine is not None and shared:
        ranks = max(engine.gpus, 1)  # so many are beside an engine
        found = {
            name: replace(place, beside=f"engine {rank // ranks}") for rank, (name, place) in enumerate(found.items())
        }
    if (critic := plan.critic_section) is not None:
        place = Place(cpus=critic.threads, gpus=int(critic.gpus > 0))
        found |= {f"critic {rank}": place for rank in range(critic.world_size)}
    if engine is not None:
        gpus = 0 if shared else engine.gpus  # those of the trainer's ranks
        found |= {f"engine {index}": Place(cpus=engine.threads, gpus=gpus) for index in range(engine.count)}
    if plan.teacher is not None:
        section = plan.teacher.engine_section
        place = Place(cpus=section.threads, gpus=section.gpus)
        found |= {f"teacher {index}": place for index in range(section.count)}
    return {**found, "collector": Place(cpus=1)}
