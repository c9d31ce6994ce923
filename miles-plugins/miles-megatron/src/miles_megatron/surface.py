"""Megatron-core's own options, as its configuration classes declare them: read from its source, without importing it.

A run file names fields of these classes in `[trainer.transformer]`, `[trainer.parallel]`, `[trainer.optimizer]`,
`[trainer.scheduler]`, `[trainer.ddp]` and `[trainer.checkpoint]`. What Miles sets itself is in `RESERVED`, with the
reason; to set such a field otherwise is an error.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miles_core.errors import MissingExtraError, UserError, nearest

SECTIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "transformer": (
        ("core/transformer/transformer_config.py", "TransformerConfig"),
        ("core/transformer/transformer_config.py", "MLATransformerConfig"),
    ),
    "parallel": (("core/model_parallel_config.py", "ModelParallelConfig"),),
    "optimizer": (("core/optimizer/optimizer_config.py", "OptimizerConfig"),),
    "scheduler": (("training/config/training_config.py", "SchedulerConfig"),),
    "ddp": (("core/distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),),
    "checkpoint": (("training/config/training_config.py", "CheckpointConfig"),),
}
"""Section -> the classes whose fields it holds, by file below the package `megatron`."""

_MODEL = "the model's config.json says it"
_DTYPE = "follows from parallel.bf16"
SAVING = "Miles names, writes and keeps checkpoints: [checkpoint]"
_LOOP = "Miles schedules forward and backward passes"
_GATHER = "weights are read after every step, to publish and to save them, so they are gathered in it"
_HEAD = "Miles computes the output layer, log-probabilities and their gradient itself, in chunks"
_GROUPS = "Miles divides the ranks by tensor, pipeline, context, expert and expert-tensor parallelism alone"
_WEIGHTS = "weights come from the model folder, or from the run's seed"
_MEGATRONS_LOOP = "it is done by Megatron's own training loop, which does not run here"
_SCALE = "only fp16 needs its loss scaled, and only bf16 and float32 train here"
_LOGS = "Miles gathers metrics and logs: trackers"
RESERVED: Mapping[str, Mapping[str, str]] = {
    "transformer": {
        "hidden_dropout": "with dropout, log-probabilities of the same weights would differ from pass to pass",
        "attention_dropout": "with dropout, log-probabilities of the same weights would differ from pass to pass",
        "calculate_per_token_loss": "the objective is a sum over tokens, weighted by Batch.weights",
        "multi_latent_attention": _MODEL,
        "activation_func": _MODEL,
        **dict.fromkeys(
            (
                "init_method",
                "init_method_std",
                "output_layer_init_method",
                "embedding_init_method",
                "embedding_init_method_std",
                "init_model_with_meta_device",
            ),
            _WEIGHTS,
        ),
        "use_mup": "it scales logits, which the log-probabilities do not know",
        **dict.fromkeys(
            ("qk_clip", "qk_clip_alpha", "qk_clip_threshold", "log_max_attention_logit"),
            _MEGATRONS_LOOP,
        ),
        "moe_per_layer_logging": _LOGS,
    },
    "parallel": {
        "fp16": "only bf16 and float32 train here; set parallel.bf16",
        "params_dtype": _DTYPE,
        "pipeline_dtype": _DTYPE,
        "variable_seq_lengths": "packed micro-batches differ in length",
        "perform_initialization": _WEIGHTS,
        "tp_comm_overlap": "its buffers are made by Megatron's own start, which does not run here",
        "timers": "an object, not a value",
        "defer_embedding_wgrad_compute": _HEAD,
        "cross_entropy_loss_fusion": _HEAD,
        "cross_entropy_fusion_impl": _HEAD,
        "deallocate_pipeline_outputs": _LOOP,
        **dict.fromkeys(
            (
                "expert_gtp_weight_remat_size",
                "expert_tensor_parallel_num_weight_shards",
                "gtp_weight_remat_size",
                "hierarchical_context_parallel_sizes",
                "hybrid_context_parallel",
                "pipeline_model_parallel_comm_backend",
                "tensor_parallel_num_weight_shards",
            ),
            _GROUPS,
        ),
        **dict.fromkeys(
            (
                "overlap_moe_expert_parallel_comm",
                "finalize_model_grads_func",
                "grad_scale_func",
                "moe_grad_scale_func",
                "mtp_grad_scale_func",
                "no_sync_func",
                "grad_sync_func",
                "param_sync_func",
            ),
            _LOOP,
        ),
    },
    "optimizer": {
        "fp16": "only bf16 and float32 train here; set parallel.bf16",
        "bf16": "follows from parallel.bf16",
        "params_dtype": _DTYPE,
        "use_distributed_optimizer": "follows from ddp.use_distributed_optimizer",
        "overlap_param_gather": _GATHER,
        "overlap_param_gather_with_optimizer_step": _GATHER,
        "timers": "an object, not a value",
        **dict.fromkeys(
            ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"), _SCALE
        ),
        "log_num_zeros_in_grad": _LOGS,
    },
    "scheduler": {
        "lr_decay_samples": "Miles counts optimizer steps; set scheduler.lr_decay_iters",
        "lr_warmup_samples": "Miles counts optimizer steps; set scheduler.lr_warmup_iters",
        "lr_wsd_decay_samples": "Miles counts optimizer steps; set scheduler.lr_wsd_decay_iters",
        "override_opt_param_scheduler": "a checkpoint is restored in the stage that it was saved in",
        "use_checkpoint_opt_param_scheduler": "a checkpoint is restored in the stage that it was saved in",
        "no_weight_decay_cond_type": "set optimizer.apply_wd_to_qk_layernorm, as Megatron itself asks for",
    },
    "ddp": {
        "use_megatron_fsdp": "Megatron's FSDP is not supported here",
        "use_custom_fsdp": "Megatron's FSDP is not supported here",
        "num_distributed_optimizer_instances": _GROUPS,
        "overlap_param_gather": _GATHER,
        "average_in_collective": "gradients are summed, never averaged",
        "check_for_nan_in_grad": "Miles checks each step and names the sample",
    },
    "checkpoint": {},
}
"""Section -> fields that Miles sets, each with the reason."""

OPEN: Mapping[str, tuple[frozenset[str], str]] = {"checkpoint": (frozenset({"async_save", "verify_integrity"}), SAVING)}
"""Section of which Miles sets all but a few fields -> these, and the reason for the others."""

RESERVED_VALUES: Mapping[str, Any] = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "calculate_per_token_loss": True,
    "variable_seq_lengths": True,
    "perform_initialization": False,
    "average_in_collective": False,
    "check_for_nan_in_grad": False,
    "fp16": False,
    "use_mup": False,
    "init_model_with_meta_device": False,
    "use_megatron_fsdp": False,
    "use_custom_fsdp": False,
    "defer_embedding_wgrad_compute": False,
    "cross_entropy_loss_fusion": False,
    "deallocate_pipeline_outputs": True,
    "overlap_param_gather": False,
    "overlap_param_gather_with_optimizer_step": False,
    "expert_gtp_weight_remat_size": 1,
    "gtp_weight_remat_size": 1,
    "hybrid_context_parallel": False,
    "overlap_moe_expert_parallel_comm": False,
    "num_distributed_optimizer_instances": 1,
    "qk_clip": False,
    "log_max_attention_logit": False,
    "moe_per_layer_logging": False,
    "tp_comm_overlap": False,
    "log_num_zeros_in_grad": False,
}
"""What Miles sets reserved fields to, where that is a plain value; saying the same is no conflict."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of one of Megatron's configuration classes. annotation: its type, as written; owner: the class."""

    name: str
    annotation: str
    owner: str


def root() -> Path:
    """The folder of the installed package `megatron`. Raises `MissingExtraError` if it is not installed."""
    spec = find_spec("megatron")  # a namespace package: nothing is imported
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if Path(folder, "core").is_dir():
            return Path(folder)
    raise MissingExtraError(
        "trainer 'megatron' needs megatron-core: pip install 'miles-megatron[core]' "
        "(on Python 3.11: pip install --no-deps --ignore-requires-python megatron-core==0.19.2)"
    )


@cache
def fields(section: str) -> Mapping[str, Field]:
    """Name -> field, of the classes of a section; of `transformer` without those that `parallel` has."""
    inherited = fields("parallel") if section == "transformer" else {}
    found = {}
    for file, cls in SECTIONS[section]:
        for name, annotation in _declared(root() / file, cls):
            if name not in inherited:
                found[name] = Field(name=name, annotation=annotation, owner=cls)
    return found


def _declared(file: Path, cls: str) -> list[tuple[str, str]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls)
    return [
        (node.target.id, ast.unparse(node.annotation))
        for node in body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not node.target.id.startswith("_")
        and not (isinstance(node.value, ast.Call) and "init=False" in ast.unparse(node.value))
    ]


def reserved(section: str, name: str) -> str:
    """Why Miles sets a field itself; empty if it does not."""
    open_, reason = OPEN.get(section, (frozenset({name}), ""))
    return RESERVED[section].get(name, "") or ("" if name in open_ else reason)


def check(section: str, given: Mapping[str, Any]) -> None:
    """Refuses fields that Megatron does not have, that belong elsewhere, and that Miles sets. Raises `UserError`."""
    if not given:
        return
    known = fields(section)
    for name, value in given.items():
        reason = reserved(section, name) if name in known else ""
        if reason and (name not in RESERVED_VALUES or RESERVED_VALUES[name] != value):
            raise UserError(f"{section}.{name} cannot be set to {value!r}: {reason}")
        if name in known and not reason:
            _check_value(section, name, value)
        if name not in known:
            raise UserError(f"{section} has no option {name!r}. {_elsewhere(section, name) or nearest(name, known)}")


def _check_value(section: str, name: str, value: Any) -> None:
    """Refuses what the class does not declare, as far as a run file can say it. Raises `UserError`."""
    annotation = fields(section)[name].annotation
    allowed = _allowed(ast.parse(annotation, mode="eval").body)
    if value is None or allowed is None or any(_is(value, one) for one in allowed):
        return
    choices = [one for one in allowed if not isinstance(one, type)]
    if choices and len(choices) == len([one for one in allowed if one is not type(None)]):
        raise UserError(f"{section}.{name} cannot be {value!r}; it is one of {', '.join(map(repr, choices))}")
    raise UserError(f"{section}.{name} cannot be {value!r}; Megatron-core declares it as {annotation}")


_TYPES = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "List": list,
    "Tuple": list,
    "tuple": list,
}


def _allowed(annotation: ast.expr) -> list[Any] | None:
    """Types and values that an annotation allows; None if it names a type that a run file has no words for."""
    match annotation:
        case ast.Constant(value=None):
            return [type(None)]
        case ast.Name(id=name):
            return [_TYPES[name]] if name in _TYPES else None
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return [ast.literal_eval(one) for one in _several(inner)]
        case ast.Subscript(value=ast.Name(id="Optional" | "Union"), slice=inner):
            return _either(_several(inner))
        case ast.Subscript(value=ast.Name() as outer):
            return _allowed(outer)
        case ast.BinOp(left=left, right=right):
            return _either([left, right])
    return None


def _several(inner: ast.expr) -> list[ast.expr]:
    return inner.elts if isinstance(inner, ast.Tuple) else [inner]


def _either(annotations: list[ast.expr]) -> list[Any] | None:
    found = [_allowed(one) for one in annotations]
    return None if None in found else [one for part in found for one in part or ()]


def _is(value: Any, allowed: Any) -> bool:
    """Whether a value of a run file is one that is allowed; true is no number, and a whole number is one."""
    if not isinstance(allowed, type):
        return bool(value == allowed) and type(value) is type(allowed)
    if isinstance(value, bool) or allowed is bool:
        return isinstance(value, bool) and allowed is bool
    kinds = {float: (int, float), list: (list, tuple)}.get(allowed, (allowed,))
    return isinstance(value, kinds)


def _elsewhere(section: str, name: str) -> str:
    homes = [f"[trainer.{other}]" for other in SECTIONS if other != section and name in fields(other)]
    return f"It belongs in {' or '.join(homes)}." if homes else ""
