"""What a folder must hold, said without Megatron, against what Megatron builds; and what is refused of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_kit import MODELS, config_of
from safetensors.numpy import save_file

from miles_core.errors import UserError
from miles_core.megatron import MegatronModel
from miles_megatron import families, start, tensors
from miles_megatron.layout import check_run
from miles_megatron.options import TrainerOptions

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in MODELS},
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3-moe in every second layer": ("qwen3-moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
    "deepseek-v3 that predicts": ("deepseek-v3", {"num_nextn_predict_layers": 2}),
    "glm4-moe that predicts": ("glm4-moe", {"num_nextn_predict_layers": 1}),
    "glm4-moe without biases": ("glm4-moe", {"attention_bias": False, "use_qk_norm": False}),
}
"""Every family, and what changes which tensors there are."""


def config_json(variant: str) -> dict[str, Any]:
    name, changes = VARIANTS[variant]
    architectures = {
        "qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM",
        "qwen3-moe": "Qwen3MoeForCausalLM", "glm4-moe": "Glm4MoeForCausalLM",
    }  # fmt: skip
    return {"architectures": [architectures.get(name, "DeepseekV3ForCausalLM")], **config_of(name), **changes}


def described(variant: str) -> MegatronModel:
    found = families.describe(config_json(variant))
    return found.predicting(len(found.predictions))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_expected_is_what_megatron_builds(variant: str, tmp_path: Path) -> None:
    start.prepare()
    from miles_megatron import convert

    (tmp_path / "config.json").write_text(json.dumps(config_json(variant)))
    with convert._one_rank():
        built = convert._Skeleton(tmp_path, (), lambda model: len(model.predictions)).shapes
    required, optional = tensors.expected(described(variant))
    assert required == built
    assert len(optional) == len(described(variant).copies)


def folder_of(variant: str, folder: Path) -> Path:
    """A model folder of zeros."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(variant)))
    required, _ = tensors.expected(described(variant))
    held = {name: np.zeros(shape or (), np.float16) for name, shape in required.items()}
    save_file(held, folder / "model.safetensors")
    return folder


def change(folder: Path, how: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.numpy import load_file

    held = load_file(folder / "model.safetensors")
    how(held)
    save_file(held, folder / "model.safetensors")


def refusal(variant: str, folder: Path) -> str:
    """What the planner is told of it."""
    with pytest.raises(UserError) as refused:
        check_run(TrainerOptions(), config_json(variant), families.describe(config_json(variant)), 1, None, folder)
    return str(refused.value)


@pytest.mark.parametrize("variant", MODELS)
def test_a_folder_with_other_tensors_is_refused_before_anything_starts(variant: str, tmp_path: Path) -> None:
    folder = folder_of(variant, tmp_path / "model")
    description = families.describe(config_json(variant))
    norm = "model.layers.1.post_attention_layernorm.weight"
    check_run(TrainerOptions(), config_json(variant), description, 1, None, folder)
    change(folder, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4)}))
    check_run(TrainerOptions(), config_json(variant), description, 1, None, folder)
    change(folder, lambda held: held.update({norm: np.zeros(7)}))
    assert refusal(variant, folder) == (
        f"{folder}/model.safetensors: {norm} has shape (7,), but the model's config.json makes it (32,)"
    )
    change(folder, lambda held: held.update({"model.odd.weight": np.zeros(1), "model.odder.weight": np.zeros(1)}))
    assert refusal(variant, folder) == (
        f"{folder} holds the tensor model.odd.weight and 1 more, which the model's config.json does not know"
    )
    change(folder, lambda held: held.pop(norm))
    assert refusal(variant, folder) == f"{folder} lacks the tensor {norm}, which the model's config.json asks for"


def test_what_only_a_built_model_shows_is_left_to_the_ranks() -> None:
    plain = described("qwen3-moe")
    attention = {"self_attention": "acme:Attention"}
    own = MegatronModel(**{**vars(plain), "layers": {1: attention}, "transformer": {**plain.transformer}})
    required, optional = tensors.expected(own)
    assert not any(name.startswith("model.layers.1.self_attn.") for name in required)
    assert "model.layers.0.self_attn.q_proj.weight" in required
    assert r"model\.layers\.\d+\.self_attn\.q_proj\.weight" in optional
    reshaped = MegatronModel(**{**vars(plain), "transformer": {**plain.transformer, "attention_output_gate": True}})
    required, _ = tensors.expected(reshaped)
    assert required.keys() == tensors.expected(plain)[0].keys()
    assert set(required.values()) == {None}


_PLAN = """
import sys
from miles_core.plugins import discover
from miles_core.run.plan import make_plan
from miles_core.errors import UserError
try:
    make_plan(sys.argv[1], [], discover())
except UserError as error:
    print(error)
print(*{"torch", "megatron", "transformers"} & sys.modules.keys())
"""
RUN = """
[model]
path = "model"
[data]
name = "jsonl"
path = "data.jsonl"
[rollout]
name = "supervised"
[trainer]
name = "megatron"
[loss]
name = "sft"
[schedule]
steps = 1
prompts_per_step = 1
"""


def test_the_planner_says_where_the_folder_is_named_and_imports_nothing_heavy(tmp_path: Path) -> None:
    from miles_core.run.tokenizers import make_tokenizer

    folder = folder_of("qwen3", tmp_path / "model")
    make_tokenizer("ascii", folder)
    change(folder, lambda held: held.pop("model.norm.weight"))
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    command = [sys.executable, "-c", _PLAN, "run.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "run.toml:3: model folder model lacks the tensor model.norm.weight, which the model's config.json asks for",
        "",
    ], done.stderr
