"""Megatron's own command-line flags after `--`, made of its own parser and of the fields of its configuration classes.

A flag whose value Megatron keeps in a field of a configuration class sets that field; a field that its parser has no
flag for gets one by its own name. Megatron's code renames some on the way from the command line to its classes;
`RENAMED` says the same. All others are for what Miles does itself and are refused with what to say instead.
"""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from miles_core.config.source import parse_value
from miles_core.flags import Flag, Place, from_parser
from miles_megatron import start, surface

_Change = Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def _opposite(value: Any) -> Any:
    return not value


RENAMED: Mapping[str, tuple[Place, _Change]] = {
    "accumulate_allreduce_grads_in_fp32": (("ddp", "grad_reduce_in_fp32"), _same),
    "bias_gelu_fusion": (("transformer", "bias_activation_fusion"), _same),
    "bias_swiglu_fusion": (("transformer", "bias_activation_fusion"), _same),
    "check_for_nan_in_loss_and_grad": (("ddp", "check_for_nan_in_grad"), _same),
    "cuda_graph_scope_deprecated": (("transformer", "cuda_graph_scope"), _same),
    "decoder_first_pipeline_num_layers": (("transformer", "num_layers_in_first_pipeline_stage"), _same),
    "decoder_last_pipeline_num_layers": (("transformer", "num_layers_in_last_pipeline_stage"), _same),
    "grad_reduce_in_bf16": (("ddp", "grad_reduce_in_fp32"), _opposite),
    "no_persist_layer_norm": (("transformer", "persist_layer_norm"), _opposite),
    "num_experts": (("transformer", "num_moe_experts"), _same),
    "num_virtual_stages_per_pipeline_rank": (("parallel", "virtual_pipeline_model_parallel_size"), _same),
    "recompute_activations": (("transformer", "recompute_granularity"), lambda _: "selective"),
    "te_rng_tracker": (("parallel", "use_te_rng_tracker"), _same),
}
"""What Megatron's parser and its classes name otherwise: name in the parser -> the field, and its value from the
flag's. The prefix `ddp_` beside it means a field of `ddp`."""

_MODEL = "the model's config.json says it"
_DATA = "Miles reads its own data: [data]"
_LOOP = "Miles runs the loop: [schedule], and trainer.micro_batch_tokens for the size of micro-batches"
_LOGGING = "Miles gathers metrics and logs: trackers"
REASONS: Mapping[str, str] = {
    "network size": _MODEL,
    "moe": _MODEL,
    "heterogeneous architecture": _MODEL,
    "training": _LOOP,
    "rl": "Miles has losses, advantages and rollouts of its own: [loss], [advantage], [rollout]",
    "RNG and initialization": "Miles seeds a run (seed), and weights come from the model folder",
    "checkpointing": surface.SAVING,
    "validation": "Miles evaluates: [evaluation]",
    "data and dataloader": _DATA,
    "sft": _DATA,
    "tokenizer": "the tokenizer of the model folder is used: model.path",
    "logging": _LOGGING,
    "profiling": _LOGGING,
    "one logger": _LOGGING,
    "inference": "an engine generates: [engine]",
    "distributed init": "Miles starts and divides the ranks: [trainer] gpus, [trainer.parallel] and [cluster]",
    "In-process restart": "Miles goes on with a run that failed: miles resume",
    "autoresume": "Miles goes on with a run that failed: miles resume",
    "Logits Distillation": "Miles distils from [teacher]",
}
"""Group of Megatron's parser -> why its flags that set no field are refused, and what to say instead."""


def flags() -> dict[str, Flag]:
    """All of them; imports Megatron. See `miles_core.flags`. Raises `MissingExtraError` if it is not installed."""
    parser = _parser()
    group_of = {action: group.title or "" for group in parser._action_groups for action in group._group_actions}
    found = {
        name: _changed(name, flag, parser)
        for name, flag in from_parser(parser, lambda action: _place(action.dest, group_of.get(action, ""))).items()
    }
    for section in surface.SECTIONS:
        for field in surface.fields(section):
            found.setdefault(f"--{field.replace('_', '-')}", _of_field(field))
    return found


def _parser() -> argparse.ArgumentParser:
    start.prepare()
    if sys.version_info < (3, 12):  # two files of Megatron's import it from there, though nothing calls it
        setattr(typing, "override", _same)  # noqa: B010  # mypy knows that typing has none
    from megatron.training.arguments import add_megatron_arguments

    parser: argparse.ArgumentParser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser


def _place(name: str, group: str) -> Sequence[Place] | str:
    """The fields that an option of the parser goes to, or why it is refused."""
    if name in RENAMED:
        return [RENAMED[name][0]]
    if name.startswith("ddp_") and (own := name.removeprefix("ddp_")) in surface.fields("ddp"):
        return [("ddp", own)]
    homes = [section for section in surface.SECTIONS if name in surface.fields(section)]
    free = [section for section in homes if not surface.reserved(section, name)]
    if homes:
        return [(section, name) for section in free or homes[:1]]
    return REASONS.get(group, f"Miles has no use for Megatron's options of {group!r}")


def _changed(name: str, flag: Flag, parser: argparse.ArgumentParser) -> Flag:
    """With the value that the fields get, which must not contradict Miles."""
    if flag.refusal:
        return flag
    dest = parser._option_string_actions[name].dest
    change = RENAMED[dest][1] if dest in RENAMED else _same
    return _checked(lambda words: change(flag.read(words)), flag.places)


def _of_field(name: str) -> Flag:
    """Of a field that the parser has no flag for."""
    place = _place(name, "")
    assert not isinstance(place, str)
    return _checked(lambda words: parse_value(" ".join(words)) if words else True, tuple(place))


def _checked(read: Callable[[Sequence[str]], Any], places: Sequence[Place]) -> Flag:
    def checked(words: Sequence[str]) -> Any:
        value = read(words)
        for section, field in places:
            surface.check(section, {field: value})
        return value

    return Flag(places=tuple(places), read=checked)
