"""Megatron's own flags after `--`: all that its parser has, each to a field or refused with a reason."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import pytest

from miles_core.flags import Flag
from miles_megatron import flags as module
from miles_megatron import surface


@pytest.fixture(scope="module")
def flags() -> Mapping[str, Flag]:
    return module.flags()


def test_every_flag_of_the_parser_and_every_field_is_there(flags: Mapping[str, Flag]) -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser())
    names = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    assert len(names) > 800
    assert names <= flags.keys()
    settable = {
        (section, name)
        for section in surface.SECTIONS
        for name in surface.fields(section)
        if not surface.reserved(section, name)
    }
    assert settable <= {place for flag in flags.values() for place in flag.places}


@pytest.mark.parametrize(
    ("words", "places"),
    [
        (["--tensor-model-parallel-size", "2"], {("parallel", "tensor_model_parallel_size"): 2}),
        (["--bf16"], {("parallel", "bf16"): True}),
        (["--no-bias-dropout-fusion"], {("transformer", "bias_dropout_fusion"): False}),
        (["--recompute-modules", "mlp", "moe"], {("transformer", "recompute_modules"): ["mlp", "moe"]}),
        (["--recompute-activations"], {("transformer", "recompute_granularity"): "selective"}),
        (["--attention-backend", "flash"], {("transformer", "attention_backend"): "flash"}),
        (["--grad-reduce-in-bf16"], {("ddp", "grad_reduce_in_fp32"): False}),
        (["--ddp-bucket-size", "1000"], {("ddp", "bucket_size"): 1000}),
        (["--virtual-pipeline-model-parallel-size", "2"], {("parallel", "virtual_pipeline_model_parallel_size"): 2}),
        (["--fp8-recipe", "mxfp8"], {("transformer", "fp8_recipe"): "mxfp8", ("optimizer", "fp8_recipe"): "mxfp8"}),
        (["--async-save"], {("checkpoint", "async_save"): True}),
        (["--lr-decay-style", "cosine"], {("scheduler", "lr_decay_style"): "cosine"}),
        (["--hidden-dropout", "0.0"], {("transformer", "hidden_dropout"): 0.0}),
    ],
)
def test_a_flag_sets_the_fields_that_megatron_would_set(
    flags: Mapping[str, Flag], words: list[str], places: dict[Any, Any]
) -> None:
    flag = flags[words[0]]
    assert dict.fromkeys(flag.places, flag.read(words[1:])) == places


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--seed", "1"], "Miles seeds a run"),
        (["--micro-batch-size", "1"], "trainer.micro_batch_tokens"),
        (["--save", "x"], "Miles names, writes and keeps checkpoints"),
        (["--data-path", "x"], "Miles reads its own data"),
        (["--wandb-project", "x"], "trackers"),
        (["--swiglu"], "the model's config.json says it"),
        (["--hidden-dropout", "0.1"], "cannot be set to 0.1: with dropout"),
        (["--fp16"], "only bf16 and float32 train here"),
        (["--calculate-per-token-loss", "--x"], "unrecognized arguments"),
        (["--lr", "much"], "invalid float value: 'much'"),
    ],
)
def test_what_miles_sets_itself_is_refused(flags: Mapping[str, Flag], words: list[str], reason: str) -> None:
    flag = flags[words[0]]
    if flag.refusal:
        assert reason in flag.refusal
    else:
        with pytest.raises(ValueError, match=reason):
            flag.read(words[1:])
