"""The critic under every kind of layout, beside the policy in its processes, against that of the trainer `torch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_kit import (
    make_critic,
    make_model,
    make_trainer,
    run_jobs,
    torch_critic,
    torch_trainer,
    train,
    train_critic,
)

from miles_core.errors import UserError

pytestmark = pytest.mark.timeout(900)  # two processes start, on few cores

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tensor_model_parallel_size": 2}},
    "tp2 sp": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "pp2": {"parallel": {"pipeline_model_parallel_size": 2}, "micro_batch_tokens": 40},
    "cp2": {"parallel": {"context_parallel_size": 2}, "micro_batch_tokens": 40},
    "experts ep2": {"parallel": {"expert_model_parallel_size": 2}},
}
SAVED, RESTORED = "tp2 sp", "pp2"


def model_of(layout: str) -> str:
    return "qwen3-moe" if layout.startswith("experts") else "qwen3"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Layout, or model for its reference -> what came of training; "on" went on from a checkpoint of another layout."""
    folder = tmp_path_factory.mktemp("critics")
    models = {name: make_model(folder / name, name) for name in ("qwen3", "qwen3-moe")}
    found: dict[str, Any] = {"folder": folder}
    for name, model in models.items():
        policy, critic = torch_trainer(model), torch_critic(model)
        found[name] = train_critic(critic, [0, 1]) | {"policy": train(policy, [0])}
    jobs = [
        {"model": str(models[model_of(name)]), "options": options, "seeds": [0], "critic": [0, 1]}
        for name, options in LAYOUTS.items()
    ]
    # Of a critic that has taken one step, and of the step after it under another layout.
    shared = {"model": str(models["qwen3"]), "seeds": []}
    jobs.append({**shared, "options": LAYOUTS[SAVED], "critic": [0], "save": str(folder / "saved")})
    jobs.append({**shared, "options": LAYOUTS[RESTORED], "critic": [1], "restore": str(folder / "saved")})
    *results, _, found["on"] = run_jobs(folder / "ranks", 2, jobs)
    return found | dict(zip(LAYOUTS, results, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_numbers_are_those_of_the_trainer_torch(trained: dict[str, Any], layout: str) -> None:
    own, reference = trained[layout], trained[model_of(layout)]
    assert np.abs(reference["before"]).max() > 0.01
    np.testing.assert_allclose(own["before"], reference["before"], atol=1e-5)
    for step, expected, tolerance in zip(own["metrics"], reference["metrics"], (1e-5, 1e-4), strict=True):
        assert step.keys() == expected.keys()
        for name in ("loss", "grad_norm", "value", "tokens"):
            assert step[name] == pytest.approx(expected[name], rel=tolerance, abs=1e-6), name
    np.testing.assert_allclose(own["after"], reference["after"], atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_policy_beside_it_trains_as_if_alone(trained: dict[str, Any], layout: str) -> None:
    own, reference = trained[layout]["policy"], trained[model_of(layout)]["policy"]
    for name in ("loss", "grad_norm", "entropy"):
        assert own["metrics"][0][name] == pytest.approx(reference["metrics"][0][name], rel=1e-5), name
    np.testing.assert_allclose(own["after"][0], reference["after"][0], atol=2e-4)


def test_it_goes_on_from_a_checkpoint_of_another_layout(trained: dict[str, Any]) -> None:
    on, whole = trained["on"], trained[RESTORED]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert on["metrics"][0][name] == pytest.approx(whole["metrics"][1][name], rel=1e-5), name
    np.testing.assert_allclose(on["after"], whole["after"], atol=1e-5)


def test_a_checkpoint_of_a_policy_or_another_model_is_refused(trained: dict[str, Any], tmp_path: Path) -> None:
    critic = make_critic(make_model(tmp_path / "wide", intermediate_size=80))
    with pytest.raises(UserError, match="dist cannot be loaded: Global shape mismatch"):
        critic.restore(trained["folder"] / "saved")
    with pytest.raises(UserError, match=r"gate_proj.weight has shape \(64, 32\), but the model's config.json makes it"):
        critic.load_pretrained(trained["folder"] / "qwen3")
    critic.stop()
    policy = make_trainer(trained["folder"] / "qwen3")
    with pytest.raises(UserError, match=r"lacks the tensor \S+ and \d+ more, which this run's model"):
        policy.restore(trained["folder"] / "saved")
    policy.stop()
