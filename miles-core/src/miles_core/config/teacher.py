"""Whether a run's teacher fits: its engine, its model, and the policy that learns from it.

Sampled tokens pass to the teacher as they are, so each token of the policy must have the same number there. The teacher
may know more tokens than the policy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_core.config.model import folder_config
from miles_core.config.schema import ModelSection, Plan, Teacher
from miles_core.config.traits import TEACHER, stage_columns, top_k
from miles_core.config.wording import scoring
from miles_core.errors import UserError
from miles_core.plugins import Catalog
from miles_core.run.tokenizers import make_tokenizer, numbered_tokens, tokenizer_mismatch
from miles_core.specs import AdvantageSpec, LossSpec


def check_teacher(plan: Plan, catalog: Catalog) -> None:
    """Refuses a teacher that nobody listens to, that its engine cannot serve, or that does not fit the policy.

    What lies on the hub and not on this machine is checked when the run starts. Raises `UserError`.
    """
    if plan.teacher is None:
        return
    _check_use(plan, catalog)
    _check_engine(plan, plan.teacher, catalog)
    _check_model(plan, plan.teacher)


def teacher_config(teacher: Teacher, origins: Mapping[str, str]) -> Mapping[str, Any] | None:
    """The config.json of the teacher; None for a hub model that this machine has not downloaded. Raises `UserError`."""
    return folder_config(teacher.section.path, "teacher.path", origins["teacher.path"])


def _check_use(plan: Plan, catalog: Catalog) -> None:
    if any(stage_columns(stage) & TEACHER for stage in plan.stages):
        return
    advantages = [entry.spec.name for entry in catalog.all(AdvantageSpec) if entry.spec.needs & TEACHER]
    losses = [entry.spec.name for entry in catalog.all(LossSpec) if entry.spec.needs & TEACHER]
    readers = [*(f"advantage {name!r}" for name in advantages), *(f"loss {name!r}" for name in losses)]
    raise UserError(
        f"{plan.origins['teacher.path']}: there is a teacher, but nothing reads what it says; remove [teacher], or "
        f"choose what does ({', '.join(readers) or 'no installed plugin offers any'})"
    )


def _check_engine(plan: Plan, teacher: Teacher, catalog: Catalog) -> None:
    if "scores" not in teacher.engine.spec.features:
        raise UserError(
            f"{plan.origins['teacher.engine.name']}: engine {teacher.engine.spec.name!r} cannot score given tokens, so "
            f"it cannot serve a teacher; engines that can: {scoring(catalog)}"
        )


def _check_model(plan: Plan, teacher: Teacher) -> None:
    config, where = teacher_config(teacher, plan.origins), plan.origins["teacher.path"]
    folder = Path(teacher.section.path).expanduser()
    if config is None:
        return
    longest, vocabulary = config.get("max_position_embeddings"), config.get("vocab_size")
    if isinstance(longest, int) and plan.model.max_tokens > longest:
        raise UserError(
            f"{where}: model.max_tokens is {plan.model.max_tokens}, but the teacher's max_position_embeddings is "
            f"{longest}; set model.max_tokens to {longest} or less"
        )
    asked = max(map(top_k, plan.stages))
    if isinstance(vocabulary, int) and asked > vocabulary:
        raise UserError(
            f"{where}: the loss asks for the teacher's {asked} likeliest tokens, but the teacher knows only "
            f"{vocabulary}; lower the loss's top_k"
        )
    if not folder.is_dir():
        return
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{where}: teacher folder {folder} has no weights (*.safetensors), so it has nothing to teach")
    if mismatch := _mismatch(plan.model, folder):
        raise UserError(f"{where}: {mismatch}")


def _mismatch(model: ModelSection, teacher: Path) -> str | None:
    """Why the teacher cannot read the policy's tokens, as far as tokenizer.json says."""
    with tempfile.TemporaryDirectory() as made:
        policy = Path(made) if model.family is not None else Path(str(model.path)).expanduser()
        if model.family is not None:
            make_tokenizer(model.tokenizer, policy)
        if numbered_tokens(policy) is None or numbered_tokens(teacher) is None:
            return None
        return tokenizer_mismatch(policy, teacher)
