"""Every layout on CPU ranks against one process of the trainer `torch`: the same loss, gradient norm and weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from megatron_kit import make_model, one_by_one, run_jobs, torch_trainer, train

pytestmark = pytest.mark.timeout(900)  # many processes start, on few cores

TWO: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2 in small micro-batches": {"micro_batch_tokens": 24},
    "dp2 without the distributed optimizer": {"ddp": {"use_distributed_optimizer": False}},
    "dp2 overlapped": {"ddp": {"overlap_grad_reduce": True}},
    "qwen2 tp2": {"parallel": {"tensor_model_parallel_size": 2}},  # divides biases, too
    "tp2 sp": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "pp2": {"parallel": {"pipeline_model_parallel_size": 2}, "micro_batch_tokens": 24},
    "pp2 vp2": {
        "parallel": {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        },
        "micro_batch_tokens": 24,
    },
    "llama cp2": {"parallel": {"context_parallel_size": 2}, "micro_batch_tokens": 40},
    "tp2 recomputed": {
        "parallel": {"tensor_model_parallel_size": 2},
        "transformer": {
            "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
        },
    },
}  # fmt: skip
FOUR: dict[str, dict[str, Any]] = {
    "tp2 pp2": {"parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}},
    "llama tp2 sp dp2": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "cp2 tp2 sp": {
        "parallel": {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    },
    "cp2 pp2": {"parallel": {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}, "micro_batch_tokens": 40},
}
EXPERTS_TWO: dict[str, dict[str, Any]] = {
    "experts ep2": {"parallel": {"expert_model_parallel_size": 2}},
    "experts pp2": {"parallel": {"pipeline_model_parallel_size": 2}, "micro_batch_tokens": 40},
    "experts tp2 sp": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
}
EXPERTS_FOUR: dict[str, dict[str, Any]] = {
    "experts ep2 tp2 sp": {
        "parallel": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True}
    },
    "experts ep2 tp2 sp, each expert whole": {
        "parallel": {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": True,
        }
    },
}
LATENT_TWO: dict[str, dict[str, Any]] = {
    "latent ep2": {"parallel": {"expert_model_parallel_size": 2}},
    "latent tp2 sp": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "kimi cp2": {"parallel": {"context_parallel_size": 2}},  # the same with stretched positions
    "glm pp2": {"parallel": {"pipeline_model_parallel_size": 2}},
}
LATENT_FOUR: dict[str, dict[str, Any]] = {
    "latent ep2 pp2": {"parallel": {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}},
}
ALL = [*TWO, *FOUR, *EXPERTS_TWO, *EXPERTS_FOUR, *LATENT_TWO, *LATENT_FOUR]
MODELS = {
    "llama": "llama",
    "qwen2": "qwen2",
    "experts": "qwen3-moe",
    "latent": "deepseek-v3",
    "kimi": "kimi-k2",
    "glm": "glm4-moe",
}
SEEDS = [0, 1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Layout -> what came of training under it, and each model's reference under its name."""
    folder = tmp_path_factory.mktemp("layouts")
    models = {name: make_model(folder / name, name) for name in dict.fromkeys(map(model_of, ALL))}
    results = {}
    for name, model in models.items():
        reference = torch_trainer(model)
        results[name] = train(reference, SEEDS)
        reference.stop()
    for ranks, layouts in ((2, {**TWO, **EXPERTS_TWO, **LATENT_TWO}), (4, {**FOUR, **EXPERTS_FOUR, **LATENT_FOUR})):
        jobs = [
            {"model": str(models[model_of(layout)]), "seeds": SEEDS, "options": options}
            for layout, options in layouts.items()
        ]
        results.update(zip(layouts, run_jobs(folder / str(ranks), ranks, jobs), strict=True))
    return results


def model_of(layout: str) -> str:
    """Of the first word, if that is a family and not a part of the layout."""
    return MODELS.get(layout.split()[0], "qwen3")


@pytest.mark.parametrize("layout", ALL)
def test_numbers_do_not_depend_on_the_layout(trained: dict[str, Any], layout: str) -> None:
    own, reference = trained[layout], trained[model_of(layout)]
    # After an optimizer step, Adam has made small differences of small gradients large.
    for step, expected, tolerance in zip(own["metrics"], reference["metrics"], (1e-5, 1e-4), strict=True):
        for name in ("loss", "grad_norm", "entropy", "ppo_kl", "loss_max", "tokens", "mismatch/kl"):
            assert step[name] == pytest.approx(expected[name], rel=tolerance, abs=1e-6), name
    np.testing.assert_allclose(own["before"], reference["before"], atol=2e-5)
    np.testing.assert_allclose(own["after"][1], reference["before"], atol=2e-5)  # the reference stayed
    np.testing.assert_allclose(own["after"][0], reference["after"][0], atol=2e-4)
    weights = one_by_one(reference["weights"])
    assert own["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(own["weights"][name], weight, rtol=0, atol=1e-4)
