"""Megatron's own options in a run file, and what is refused before a process is started."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from megatron_kit import config_of

from miles_core.errors import MissingExtraError, UserError
from miles_megatron import surface
from miles_megatron.layout import check_run
from miles_megatron.options import TrainerOptions
from miles_qwen.megatron import qwen3, qwen3_moe


def test_sections_hold_the_fields_of_the_classes_that_megatron_declares() -> None:
    script = """
import dataclasses, json
from miles_megatron import start
start.prepare()
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig
names = lambda cls: {field.name for field in dataclasses.fields(cls) if field.init and not field.name.startswith("_")}
parallel = names(ModelParallelConfig)
print(json.dumps({
    "transformer": sorted(names(MLATransformerConfig) - parallel),
    "parallel": sorted(parallel),
    "optimizer": sorted(names(OptimizerConfig)),
    "ddp": sorted(names(DistributedDataParallelConfig)),
}))
"""
    import json

    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    declared = json.loads(done.stdout.splitlines()[-1])
    assert {section: sorted(surface.fields(section)) for section in declared} == declared
    assert {"async_save", "verify_integrity"} <= surface.fields("checkpoint").keys()
    assert {"lr_decay_style", "lr_warmup_iters"} <= surface.fields("scheduler").keys()  # needs Python 3.12 to import


def test_every_reserved_field_exists_in_megatron() -> None:
    for section, reserved in surface.RESERVED.items():
        assert reserved.keys() <= surface.fields(section).keys(), section


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"transformer": {"recompute_granularty": "full"}},
            "transformer has no option 'recompute_granularty'. Did you mean 'recompute_granularity'",
        ),
        (
            {"transformer": {"tensor_model_parallel_size": 2}},
            r"transformer has no option 'tensor_model_parallel_size'. It belongs in \[trainer.parallel\]",
        ),
        ({"optimizer": {"learning_rate": 1e-6}}, "optimizer has no option 'learning_rate'"),
        ({"parallel": {"fp16": True}}, "parallel.fp16 cannot be set to True: only bf16 and float32 train here"),
        (
            {"transformer": {"hidden_dropout": 0.1}},
            "transformer.hidden_dropout cannot be set to 0.1: with dropout, log-probabilities",
        ),
        (
            {"transformer": {"calculate_per_token_loss": False}},
            "calculate_per_token_loss cannot be set to False: the objective is a sum over tokens",
        ),
        (
            {"parallel": {"hierarchical_context_parallel_sizes": [2, 2]}},
            "hierarchical_context_parallel_sizes cannot be set to .*: Miles divides the ranks by tensor, pipeline",
        ),
        ({"checkpoint": {"ckpt_format": "torch"}}, "checkpoint.ckpt_format cannot be set to 'torch': Miles names"),
        ({"checkpoint": {"save_interval": 3}}, "checkpoint.save_interval cannot be set to 3: Miles names, writes and"),
        ({"checkpoint": {"async_sav": True}}, "checkpoint has no option 'async_sav'. Did you mean 'async_save'"),
        ({"ddp": {"overlap_param_gather": True}}, "overlap_param_gather cannot be set to True: weights are read"),
        ({"ddp": {"average_in_collective": True}}, "average_in_collective cannot be set to True: gradients are summed"),
        (
            {"transformer": {"recompute_granularity": "half"}},
            "transformer.recompute_granularity cannot be 'half'; it is one of 'full', 'selective'",
        ),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr cannot be 'fast'; Megatron-core declares it as"),
        ({"parallel": {"bf16": 1}}, "parallel.bf16 cannot be 1; Megatron-core declares it as bool"),
        ({"parallel": {"tensor_model_parallel_size": 2.0}}, "cannot be 2.0; Megatron-core declares it as int"),
        (
            {"optimizer": {"loss_scale": 1024.0}},
            "optimizer.loss_scale cannot be set to 1024.0: only fp16 needs its loss scaled",
        ),
        (
            {"scheduler": {"no_weight_decay_cond_type": "apply_wd_to_qk_layernorm"}},
            "no_weight_decay_cond_type cannot be set to .*: set optimizer.apply_wd_to_qk_layernorm",
        ),
        ({"transformer": {"qk_clip": True}}, "qk_clip cannot be set to True: it is done by Megatron's own training"),
        ({"optimizer": {"log_num_zeros_in_grad": True}}, "cannot be set to True: Miles gathers metrics"),
        ({"parallel": {"tp_comm_overlap": True}}, "tp_comm_overlap cannot be set to True: its buffers are made by"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1, got 0"),
    ],
)
def test_unknown_misplaced_and_contradicting_options_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        TrainerOptions(**options)


def test_saying_what_miles_sets_anyway_is_no_conflict() -> None:
    TrainerOptions(transformer={"hidden_dropout": 0.0, "calculate_per_token_loss": True})


def test_values_are_checked_against_what_megatron_declares_where_that_can_be_said_in_a_run_file() -> None:
    TrainerOptions(
        optimizer={"lr": 1, "clip_grad": 0.5, "main_grads_dtype": "bf16"},
        transformer={
            "moe_layer_freq": [0, 1],
            "recompute_modules": ["core_attn"],
            "pipeline_model_parallel_layout": "Et|tL",
            "attention_backend": "flash",
            "recompute_num_layers": None,
        },
    )


def test_without_megatron_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface, "find_spec", lambda name: None)
    surface.fields.cache_clear()
    try:
        with pytest.raises(MissingExtraError, match=r"pip install 'miles-megatron\[core\]'"):
            TrainerOptions(parallel={"bf16": True})
    finally:
        surface.fields.cache_clear()


DENSE, SPARSE = qwen3(config_of("qwen3")), qwen3_moe(config_of("qwen3-moe"))
GROUPS = qwen3({**config_of("qwen3"), "num_attention_heads": 6, "num_key_value_heads": 3})
NARROW = qwen3({**config_of("qwen3"), "intermediate_size": 63})
LATENT = dataclasses.replace(DENSE, transformer={**DENSE.transformer, "multi_latent_attention": True})


@pytest.mark.parametrize(
    ("model", "world_size", "options", "error"),
    [
        (
            DENSE, 2, {"parallel": {"tensor_model_parallel_size": 4}},
            "tensor_model_parallel_size 4 x pipeline_model_parallel_size 1 x context_parallel_size 1 = 4 does not",
        ),
        (
            DENSE, 2, {"parallel": {"tensor_model_parallel_size": 0}},
            "tensor_model_parallel_size must be at least 1, got 0",
        ),
        (
            DENSE, 2,
            {"parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 1}},
            "virtual_pipeline_model_parallel_size must be at least 2, got 1; set it so, or leave it out",
        ),
        (
            SPARSE, 2, {"parallel": {"expert_tensor_parallel_size": -2}},
            "expert_tensor_parallel_size must be at least 1, got -2",
        ),
        (
            DENSE, 2, {"parallel": {"expert_tensor_parallel_size": 4}},
            "expert_tensor_parallel_size 4 x expert_model_parallel_size 1 x pipeline_model_parallel_size 1 = 4 does",
        ),
        (
            DENSE, 3, {"parallel": {"tensor_model_parallel_size": 3}},
            "tensor_model_parallel_size: the model's 4 attention heads cannot be divided by 3",
        ),
        (
            DENSE, 3, {"parallel": {"pipeline_model_parallel_size": 3}},
            "pipeline_model_parallel_size: the model's 4 layers cannot be divided by 3",
        ),
        (
            GROUPS, 2, {"parallel": {"tensor_model_parallel_size": 2}},
            "tensor_model_parallel_size: the model's 3 key-value heads cannot be divided by 2",
        ),
        (
            NARROW, 2, {"parallel": {"tensor_model_parallel_size": 2}},
            "tensor_model_parallel_size: the model's 63 columns of an MLP cannot be divided by 2",
        ),
        (DENSE, 2, {"parallel": {"expert_model_parallel_size": 2}}, "is for models with experts; this one has none"),
        (
            SPARSE, 3, {"parallel": {"expert_model_parallel_size": 3}},
            "expert_model_parallel_size: the model's 4 experts cannot be divided by 3",
        ),
        (
            SPARSE, 2,
            {
                "parallel": {
                    "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True,
                }
            },
            "without expert parallelism Megatron would not sum the experts' gradients",
        ),
        (
            SPARSE, 2, {"parallel": {"tensor_model_parallel_size": 2}},
            "sequence_parallel must be true where a model with experts is tensor parallel",
        ),
        (
            LATENT, 2, {"parallel": {"tensor_model_parallel_size": 2}},
            "sequence_parallel must be true where a model with latent attention is tensor parallel",
        ),
        (
            DENSE, 2,
            {"parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}},
            "a virtual pipeline on two stages trains silently wrong unless overlap_p2p_comm = true",
        ),
        (
            DENSE, 2,
            {
                "parallel": {
                    "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
                    "overlap_p2p_comm": True,
                }
            },
            "overlap_p2p_comm is for virtual pipelines .* and needs batch_p2p_comm = false",
        ),
        (
            DENSE, 2,
            {"parallel": {"pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "batch_p2p_comm": False}},
            "overlap_p2p_comm is for virtual pipelines",
        ),
        (
            DENSE, 1, {"parallel": {"sequence_parallel": True}},
            "sequence_parallel needs tensor_model_parallel_size above 1",
        ),
        (
            DENSE, 1, {"transformer": {"fp4": "e2m1", "transformer_impl": "local"}},
            "fp4 needs Transformer Engine, without which Megatron ignores it",
        ),
        (
            DENSE, 1, {"parallel": {"virtual_pipeline_model_parallel_size": 2}},
            "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size >= 2",
        ),
        (
            DENSE, 1, {"transformer": {"fp8": "hybrid", "transformer_impl": "local"}},
            "fp8 needs Transformer Engine, without which Megatron ignores it",
        ),
        (
            DENSE, 1, {"transformer": {"fp8": "hybrid", "transformer_impl": "transformer_engine"}},
            "Transformer Engine is not installed",
        ),
        (
            DENSE, 1, {"transformer": {"num_moe_experts": 4}},
            "num_moe_experts makes another model than config.json describes",
        ),
        (
            DENSE, 1, {"transformer": {"softmax_scale": 0.5}},
            "softmax_scale makes another model than config.json describes",
        ),
        (
            DENSE, 1, {"transformer": {"q_lora_rank": 8}},
            "q_lora_rank is for multi-latent attention, which this model does not have",
        ),
        (
            DENSE, 1, {"transformer": {"num_layers": 8}},
            "transformer.num_layers is 8, but the model's config.json says 4; leave it out",
        ),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_or_train_wrongly_are_refused(
    model: Any, world_size: int, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(UserError, match=error):
        check_run(TrainerOptions(**options), {}, model, world_size)


def test_a_critic_on_the_policys_ranks_divides_them_as_the_policy_does() -> None:
    policy, other = TrainerOptions(parallel={"tensor_model_parallel_size": 2}), TrainerOptions()
    check_run(policy, {}, DENSE, 2, policy)
    with pytest.raises(UserError, match=r"critic.parallel divides the ranks into tensor 1 x .* give the critic ranks"):
        check_run(other, {}, DENSE, 2, policy)
    check_run(other, {}, DENSE, 2)


def test_layers_may_be_divided_unevenly() -> None:
    parallel = {"pipeline_model_parallel_size": 3}
    options = TrainerOptions(transformer={"num_layers_in_first_pipeline_stage": 2}, parallel=parallel)
    check_run(options, {}, DENSE, 3)


def test_options_and_checks_import_nothing_heavy() -> None:
    script = (
        "import sys, miles_megatron, miles_megatron.layout, miles_megatron.options as o;"
        "o.TrainerOptions(parallel={'bf16': True});"
        "assert not {'torch', 'megatron.core', 'transformers', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
