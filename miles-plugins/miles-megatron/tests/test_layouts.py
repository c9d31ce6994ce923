"""Every layout on CPU ranks against one process of the trainer `torch`: the same loss, gradient norm and weights.

Each family trains under each layout that it can have. All layouts of as many ranks share one start of these.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_kit import MODELS, make_model, one_by_one, run_jobs, torch_trainer, train

pytestmark = pytest.mark.timeout(900)  # many processes start, on few cores

TENSOR = {"tensor_model_parallel_size": 2}
SEQUENCE = {**TENSOR, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}
EXPERT = {"expert_model_parallel_size": 2}
SMALL = 40
"""Tokens of a micro-batch, of which each rank then has several; without it a batch is one micro-batch."""

EXPERTS = ("qwen3-moe", "deepseek-v3", "glm4-moe", "kimi-k2")
"""Expert parallelism is for these alone, and they are tensor parallel only with sequence parallelism: without it
Megatron refuses or miscomputes them, and Miles refuses them by test_options.py."""

TWO: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"parallel": TENSOR},
    "pp2": {"parallel": PIPELINE, "micro_batch_tokens": SMALL},
    "cp2": {"parallel": CONTEXT, "micro_batch_tokens": SMALL},
    "ep2": {"parallel": EXPERT},
}
FOUR: dict[str, dict[str, Any]] = {"tp2 pp2": {"parallel": {**TENSOR, **PIPELINE}}}
"""Layouts on two and on four ranks that every family is trained under, but for `EXPERTS`."""

OTHERS_OF_TWO: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen3", "dp2 in small micro-batches"): {"micro_batch_tokens": 24},
    ("qwen3", "dp2 without the distributed optimizer"): {"ddp": {"use_distributed_optimizer": False}},
    ("qwen3", "dp2 overlapped"): {"ddp": {"overlap_grad_reduce": True}},
    ("qwen3", "tp2 sp"): {"parallel": SEQUENCE},
    ("qwen3", "tp2 recomputed"): {
        "parallel": TENSOR,
        "transformer": {
            "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
        },
    },
    ("qwen3", "pp2, unevenly"): {
        "parallel": PIPELINE, "transformer": {"num_layers_in_first_pipeline_stage": 3},
    },
    ("qwen3", "pp2 vp2"): {
        "parallel": {
            **PIPELINE,
            "virtual_pipeline_model_parallel_size": 2,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        },
        "micro_batch_tokens": 24,
    },
}  # fmt: skip
OTHERS_OF_FOUR: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "tp2 sp dp2"): {"parallel": SEQUENCE},
    ("qwen3", "tp4 with fewer key-value heads"): {"parallel": {"tensor_model_parallel_size": 4}},
    ("qwen3", "cp2 tp2 sp"): {"parallel": {**CONTEXT, **SEQUENCE}},
    ("qwen3", "cp2 pp2"): {"parallel": {**CONTEXT, **PIPELINE}, "micro_batch_tokens": SMALL},
    ("qwen3-moe", "ep2 tp2 sp"): {"parallel": {**EXPERT, **SEQUENCE}},
    ("qwen3-moe", "ep2 tp2 sp, each expert whole"): {
        "parallel": {**EXPERT, **SEQUENCE, "expert_tensor_parallel_size": 1}
    },
    ("deepseek-v3", "ep2 pp2"): {"parallel": {**EXPERT, **PIPELINE}},
}
"""What one family shows for all."""

Case = tuple[str, str]
"""Name of a model, and of a layout."""


def cases(layouts: dict[str, dict[str, Any]], others: dict[Case, dict[str, Any]]) -> dict[Case, dict[str, Any]]:
    """Each family under each layout that it can have, and the others: options of the trainer."""
    found = {}
    for family in MODELS:
        for layout, options in layouts.items():
            parallel = options.get("parallel", {})
            if family in EXPERTS and parallel.keys() & TENSOR.keys():
                found[family, layout] = {**options, "parallel": {**parallel, **SEQUENCE}}
            elif family in EXPERTS or not parallel.keys() & EXPERT.keys():
                found[family, layout] = options
    return {**found, **others}


CASES = {2: cases(TWO, OTHERS_OF_TWO), 4: cases(FOUR, OTHERS_OF_FOUR)}
SEEDS = [0, 1]
TOKEN = 2e-5
"""What one token's log-probability may differ by, and half as much of itself: float32 rounds the logits, which are up
to tens here, in every layer. Sums over tokens are held to 1e-5 of themselves."""
WEIGHT = 1e-6
"""What a weight may differ by after two optimizer steps, each of which changes it by up to 1e-3, the learning rate: a
gradient that is wrong by a few thousandths shows. float32 rounds a weight of 1 by 1e-7."""

FAULTY: dict[str, dict[str, Any]] = {
    "pp2 dp2": {"parallel": PIPELINE, "micro_batch_tokens": SMALL},
    "tp2 dp2 without the distributed optimizer": {"parallel": TENSOR, "ddp": {"use_distributed_optimizer": False}},
}
"""Layouts of four ranks for steps that are not finite."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, name, num_hidden_layers=4 if name == "qwen3" else 2) for name in MODELS}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, Any]:
    """What training gives in one process of the trainer `torch`."""
    found = {}
    for name, model in models.items():
        reference = torch_trainer(model)
        found[name] = train(reference, SEEDS)
        found[name] |= {"after": found[name]["after"][0], "weights": one_by_one(found[name]["weights"])}
        reference.stop()
    return found


@pytest.fixture(scope="module")
def trained(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What training gives under each layout; and of those in `FAULTY`, with the faults and without those steps."""
    folder = tmp_path_factory.mktemp("layouts")
    results: dict[Any, Any] = {}
    for ranks, layouts in CASES.items():
        jobs: dict[Any, dict[str, Any]] = {
            case: {"model": str(models[case[0]]), "seeds": SEEDS, "options": options}
            for case, options in layouts.items()
        }
        for layout, options in FAULTY.items() if ranks == 4 else ():
            job = {"model": str(models["qwen3"]), "options": options}
            jobs[layout, "faulty"] = {**job, "seeds": [0, 1, 2, 3], "hooks": "test_layouts:Faults"}
            jobs[layout, "without"] = {**job, "seeds": [0, 3]}
        results.update(zip(jobs, run_jobs(folder / str(ranks), ranks, list(jobs.values())), strict=True))
    return results


@pytest.mark.parametrize("case", [case for layouts in CASES.values() for case in layouts], ids=" ".join)
def test_numbers_do_not_depend_on_the_layout(trained: dict[Any, Any], expected: dict[str, Any], case: Case) -> None:
    own, reference = trained[case], expected[case[0]]
    for step, wanted in zip(own["metrics"], reference["metrics"], strict=True):
        for name in ("loss", "grad_norm", "entropy", "tokens"):
            assert step[name] == pytest.approx(wanted[name], rel=1e-5, abs=0), name
        for name in ("ppo_kl", "mismatch/kl"):  # differences, which may be nothing
            assert step[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name
        assert step["loss_max"] == pytest.approx(wanted["loss_max"], abs=TOKEN)  # of one token, as what follows
    after, kept = own["after"]
    for found, wanted in ((own["before"], "before"), (kept, "before"), (after, "after")):
        np.testing.assert_allclose(found, reference[wanted], rtol=TOKEN / 2, atol=TOKEN, err_msg=wanted)
    assert own["weights"].keys() == reference["weights"].keys()
    for name, weight in reference["weights"].items():
        np.testing.assert_allclose(own["weights"][name], weight, rtol=0, atol=WEIGHT, err_msg=name)


# ---- Steps that are not finite -------------------------------------------------------------------------------------


class Faults:
    """On the last rank alone, makes the loss of step 1 not a number, and the gradients of step 2; lets both be skipped.

    heard: of each step what this rank's weights and optimizer state are before it, the fault, and the same after it.
    """

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.handles: list[Any] = []

    def model_built(self, context: Any, model: Any) -> None: ...
    def before_logprobs(self, context: Any, step: int, model: Any) -> None: ...

    def before_train_step(self, context: Any, step: int, model: Any, optimizer: Any, batch: Any) -> None:
        self.heard.append(digest(model, optimizer))
        norm = model.decoder.final_layernorm
        if context.rank < context.world_size - 1:
            return
        if step == 1:
            self.handles.append(norm.register_forward_hook(lambda module, inputs, output: output * math.nan))
        elif step == 2:
            self.handles.append(norm.weight.register_hook(lambda gradient: gradient * math.nan))

    def step_not_finite(self, context: Any, step: int, model: Any, optimizer: Any, fault: str) -> bool:
        self.heard.append(fault)
        return True

    def after_train_step(self, context: Any, step: int, model: Any, optimizer: Any, metrics: dict[str, float]) -> None:
        while self.handles:
            self.handles.pop().remove()
        self.heard.append(digest(model, optimizer))


def digest(model: Any, optimizer: Any) -> str:
    """Of this rank's weights, main weights and optimizer state."""
    made = hashlib.sha256()
    for tensor in (*model.state_dict().values(), *optimizer_tensors(optimizer)):
        if isinstance(tensor, torch.Tensor):
            made.update(tensor.detach().numpy().tobytes())
    return made.hexdigest()


def optimizer_tensors(optimizer: Any) -> Iterator[Any]:
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield from (parameter, *part.optimizer.state[parameter].values())


@pytest.mark.parametrize("layout", FAULTY)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(trained: dict[Any, Any], layout: str) -> None:
    faulty, without = trained[layout, "faulty"], trained[layout, "without"]
    for start, *steps in (tuple(heard) for heard in faulty["heard"]):
        first, second, not_a_loss, third, fourth, not_a_norm, fifth, sixth, last = steps
        assert start != first == second == third == fourth == fifth == sixth != last
        assert not_a_loss.endswith("the loss is not finite and the step was not taken.")
        assert "log-probability nan" in not_a_loss
        assert not_a_norm.startswith("step 2: the gradient norm is nan although all losses are finite.")
    assert [metrics.get("skipped_steps") for metrics in faulty["metrics"]] == [None, 1, 1, None]
    assert all(math.isfinite(value) for metrics in faulty["metrics"] for value in metrics.values())
    # What is trained afterwards is what would have been without these steps.
    for name, weight in without["weights"].items():
        np.testing.assert_array_equal(faulty["weights"][name], weight)
    assert faulty["metrics"][3]["grad_norm"] == without["metrics"][1]["grad_norm"]
