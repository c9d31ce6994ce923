"""The adaptive KL coefficient, by ten lines of its own, and through the collector and its checkpoints."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from collector_kit import Bench, plan, replaced
from hypothesis import given
from hypothesis import strategies as st

from miles_core.config.schema import Component, KLSection
from miles_core.run.kl import adapted, measured
from miles_core.sample import Batch
from miles_core.specs import AdvantageSpec, LossSpec


@dataclass(frozen=True, kw_only=True)
class Options:
    kl_coef: float = 0.5


def advantage(inputs: Any, options: Options) -> dict[str, Any]:
    """What it is told to weigh the divergence with, everywhere."""
    return {"advantages": np.where(inputs.mask, options.kl_coef, 0.0)}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("fake_kl")
    vars(module)["advantage"] = advantage
    monkeypatch.setitem(sys.modules, "fake_kl", module)
    with replaced():
        yield


@given(
    coefficient=st.floats(1e-4, 1),
    target=st.floats(0.01, 10),
    horizon=st.integers(100, 10_000),
    batches=st.lists(st.tuples(st.floats(-1, 20), st.integers(1, 100)), max_size=8),
)
def test_the_coefficient_follows_the_controller_of_ziegler_and_others(
    coefficient: float, target: float, horizon: int, batches: list[tuple[float, int]]
) -> None:
    mine = expected = coefficient
    for divergence, samples in batches:
        mine = adapted(mine, divergence, samples, KLSection(target=target, horizon=horizon))
        error = float(np.clip((divergence - target) / target, -0.2, 0.2))
        expected *= 1 + error * samples / horizon
    assert mine == pytest.approx(expected, rel=1e-12)
    assert mine > 0


def batch(**columns: Sequence[float]) -> Batch:
    """Three samples of 3, 2 and 2 tokens; of the first one two are trained, of the last none is."""
    mask = np.array([False, True, True, False, True, False, False])
    return Batch(
        cu_seqlens=np.array([0, 3, 5, 7]),
        columns={"mask": mask, **{name: np.array(values, np.float32) for name, values in columns.items()}},
        samples={},
    )


def test_what_is_measured_is_a_mean_over_samples() -> None:
    rollout, old, reference = [9, -1, -2, 9, -3, 9, 9], [9, -1, -4, 9, -3, 9, 9], [0, -2, -5, 0, -7, 0, 0]
    made = batch(rollout_logprobs=rollout, ref_logprobs=reference)
    assert measured(made, "sequence") == ((1 + 3) + 4) / 2
    assert measured(made, "token") == ((1 + 3) / 2 + 4) / 2
    recomputed = batch(rollout_logprobs=rollout, old_logprobs=old, ref_logprobs=reference)
    assert measured(recomputed, "sequence") == ((1 + 1) + 4) / 2


def adapting(where: str) -> Any:
    """A plan whose stage adapts the coefficient of its advantage or its loss."""
    made = plan(steps=4)
    (stage,) = made.stages
    spec: Any = {"name": "fake", "ref": "fake_kl:advantage", "summary": "x", "options": "nowhere:Options"}
    component = (
        Component(spec=AdvantageSpec(**spec, kl_coef="kl_coef"), plugin="test", options=Options())
        if where == "advantage"
        else Component(spec=LossSpec(**spec, kl_coef="kl_coef"), plugin="test", options=Options())
    )
    changes: Any = {"kl": KLSection(target=1.0, horizon=40), where: component}
    return replace(made, stages=(replace(stage, **changes),))


@pytest.mark.parametrize("where", ["advantage", "loss"])
def test_it_reaches_advantage_or_loss_and_goes_on_from_a_checkpoint(tmp_path: Path, where: str) -> None:
    async def train(bench: Bench, steps: range, begin: tuple[Any, ...]) -> list[tuple[dict[str, float], float]]:
        await bench.begin(*begin)
        found = []
        for step in steps:
            collected = await bench.batch(step, min)
            assert collected.batch is not None
            reference = collected.batch["rollout_logprobs"] - 0.25 * (step + 1)
            finished, metrics = bench.collector.finish(collected.batch, {"ref_logprobs": reference})
            used = finished["advantages"].max() if where == "advantage" else finished.loss_options["kl_coef"]
            found.append((metrics, float(used)))
        return found

    expected, coefficient = [], 0.5
    for step in range(4):  # 4 samples of 2 tokens, so a divergence of 0.5, 1, 1.5 and 2
        expected.append(coefficient)
        coefficient *= 1 + float(np.clip(0.5 * (step + 1) - 1, -0.2, 0.2)) * 4 / 40
    first = Bench(adapting(where))
    done = asyncio.run(train(first, range(2), ()))
    first.collector.save(tmp_path)
    done += asyncio.run(train(Bench(adapting(where)), range(2, 4), (2, tmp_path)))
    assert [used for _, used in done] == pytest.approx(expected)
    assert [metrics["kl_coef"] for metrics, _ in done] == pytest.approx(expected)
    assert [metrics["kl_measured"] for metrics, _ in done] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_a_batch_without_the_references_logprobs_changes_nothing() -> None:
    async def run() -> dict[str, float]:
        bench = Bench(adapting("loss"))
        await bench.begin()
        collected = await bench.batch(0, min)
        assert collected.batch is not None
        return bench.collector.finish(collected.batch, {})[1]

    metrics = asyncio.run(run())
    assert metrics["kl_coef"] == 0.5
    assert "kl_measured" not in metrics
