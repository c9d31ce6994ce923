"""Whole runs of tiny mixtures of experts with trainer `megatron` and engine `torch`: each version of the weights, whose
experts the one holds by themselves and the other together, arrives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import one_process
import pytest

RUN = """
[data]
name = "jsonl"
path = "data.jsonl"
[reward]
name = "even"
[sampling]
max_new_tokens = 6
[engine]
name = "torch"
[trainer]
name = "megatron"
micro_batch_tokens = 32
[trainer.optimizer]
lr = 1e-2
[advantage]
name = "grpo"
[loss]
name = "grpo"
[schedule]
steps = 3
prompts_per_step = 2
samples_per_prompt = 4
[model]
family = "FAMILY"
tokenizer = "ascii"
max_tokens = 40
[model.config]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 3
num_attention_heads = 4
moe_intermediate_size = 16
num_experts_per_tok = 2
"""
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-moe": {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "norm_topk_prob": True},
    "glm4-moe": {"num_key_value_heads": 2, "head_dim": 8, "n_routed_experts": 4, "num_nextn_predict_layers": 1},
    "deepseek-v3": {
        **_LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "kimi-k2": {**_LATENT, "num_key_value_heads": 4, "n_routed_experts": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_each_version_of_a_mixture_arrives(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"prompt": f"{number} + 1 =", "answer": number + 1}) for number in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "run.toml").write_text(RUN.replace("FAMILY", family))
    monkeypatch.chdir(tmp_path)
    flags = [f"model.config.{name}={json.dumps(value)}" for name, value in FAMILIES[family].items()]
    if family == "glm4-moe":  # with a layer that transformers does not know, and experts that are balanced
        balance = {"load_balancing_type": "router_load_balancing_type=seq_aux_loss", "coeff": "aux_loss_coeff=0.01"}
        flags += ["trainer.transformer.mtp_num_layers=1", *(f"trainer.transformer.moe_{v}" for v in balance.values())]
    steps = one_process.train("run.toml", flags, one_process.catalog(), monkeypatch)
    assert len(steps) == 3
    for step in steps:
        (apart,) = [value for name, value in step.items() if name.endswith("mismatch/logprob_abs_max")]
        assert apart < 1e-4
    (moved,) = {name for name in steps[-1] if name.endswith("grad_norm")}
    assert all(step[moved] > 0 for step in steps)
    further = [name for name in steps[-1] if name.endswith(("mtp/cross_entropy", "moe/seq_aux_loss"))]
    assert len(further) == (2 if family == "glm4-moe" else 0)
