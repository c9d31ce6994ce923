"""The tracker `curves`: a picture of whatever was logged, also over a resume."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.roles import RunInfo
from miles_core.run.trackers import JsonLines
from miles_trackers import miles_trackers, options
from miles_trackers.curves import Curves
from miles_trackers.picture import series, shares, smoothed, stages_of

STAGES = {
    "stages": [{"name": "warm-up", "schedule": {"steps": 4}}, {"name": "rl", "schedule": {"steps": 6}}],
}
STEP = {
    "reward": 0.5,
    "kl": 0.01,
    "mismatch/kl": 1e-9,
    "mismatch/logprob_abs": 1e-6,
    "seconds/generate": 1.0,
    "seconds/train": 3.0,
    "seconds/step": 4.0,
    "tokens_per_second": 100.0,
}


def info(folder: Path, config: dict[str, Any] | None = None) -> RunInfo:
    return RunInfo(name="test", folder=folder, config=STAGES if config is None else config, steps=10)


def pixels(folder: Path) -> Any:
    return matplotlib.image.imread(folder / "curves.png")


@pytest.mark.parametrize("config", [STAGES, {}])
def test_a_run_becomes_a_picture(tmp_path: Path, config: dict[str, Any]) -> None:
    tracker = Curves(options.Curves(every=0), info(tmp_path, config))
    tracker.log(0, {"eval/reward": 0.1})
    for step in range(1, 11):
        tracker.log(step, {**STEP, "reward": step / 10})
    tracker.log(10, {"eval/reward": 0.9})
    assert not (tmp_path / "curves.png").exists()
    tracker.finish()
    height, width, _ = pixels(tmp_path).shape
    assert (width, height) == (1760, 1216)
    assert len(np.unique(pixels(tmp_path)[::5, ::5].reshape(-1, 4), axis=0)) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": 1.0},
        {"reward": math.nan, "kl": math.nan, "eval/reward": math.inf},
        {"reward": -3.0, "eval/reward": 12.5, "kl": 0.0, "mismatch/kl": -1e-9, "seconds/step": 0.0},
        {"seconds/other": 0.0},
    ],
)
@pytest.mark.parametrize("step", [0, 1])
def test_odd_metrics_are_drawn_too(tmp_path: Path, metrics: dict[str, float], step: int) -> None:
    tracker = Curves(options.Curves(), info(tmp_path))
    tracker.log(step, metrics)
    tracker.finish()
    assert pixels(tmp_path).size


def test_nothing_logged_leaves_no_picture(tmp_path: Path) -> None:
    Curves(options.Curves(), info(tmp_path)).finish()
    assert not list(tmp_path.iterdir())


def test_every_so_many_steps_it_is_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr("miles_trackers.curves.draw", lambda rows, *rest: drawn.append(max(rows)))
    tracker = Curves(options.Curves(every=3), info(tmp_path))
    for step in range(8):
        tracker.log(step, STEP)
    tracker.finish()
    assert drawn == [3, 6, 7]


def test_a_resumed_run_is_drawn_from_its_beginning(tmp_path: Path) -> None:
    """Interrupted after step 6, resumed from step 5: the same picture as without interruption."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    rewards = [0.1, 0.2, 0.4, 0.3, 0.6, 0.7, 0.8, 0.9]
    straight = Curves(options.Curves(), info(whole))
    for step, reward in enumerate(rewards):
        straight.log(step, {**STEP, "reward": reward})
    straight.finish()
    lines = JsonLines(None, info(parts))
    for step, reward in enumerate([*rewards[:5], 0.0, 0.0]):
        lines.log(step, {**STEP, "reward": reward})
    lines.finish()
    resumed = Curves(options.Curves(), info(parts))
    for step in range(5, 8):
        resumed.log(step, {**STEP, "reward": rewards[step]})
    resumed.finish()
    np.testing.assert_array_equal(pixels(whole), pixels(parts))


def test_a_failed_drawing_leaves_the_last_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Curves(options.Curves(), info(tmp_path))
    tracker.log(1, STEP)
    tracker.finish()
    before = (tmp_path / "curves.png").read_bytes()

    def half(self: Any, path: Path, **rest: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("miles_trackers.picture.Figure.savefig", half)
    with pytest.raises(OSError, match="disk full"):
        tracker.finish()
    assert (tmp_path / "curves.png").read_bytes() == before


def test_stages_follow_each_other() -> None:
    assert [(span.name, span.first, span.last) for span in stages_of(STAGES)] == [("warm-up", 0, 4), ("rl", 4, 10)]
    assert stages_of({}) == []


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(1, 20))
def test_smoothing_is_the_weighted_mean_of_what_came_before(values: list[float], span: float) -> None:
    keep = 1 - 1 / span
    for place, smooth in enumerate(smoothed(np.array(values), span)):
        weights = [keep ** (place - earlier) for earlier in range(place + 1)]
        np.testing.assert_allclose(smooth, np.average(values[: place + 1], weights=weights), rtol=1e-9, atol=1e-6)


def test_series_and_shares_count_what_is_finite() -> None:
    rows = {
        2: {"reward": 0.5, "seconds/train": 3.0},
        1: {"reward": math.nan, "seconds/train": math.inf},
        3: {"seconds/other": 1.0},
    }
    steps, values = series(rows, "reward")
    assert (steps.tolist(), values.tolist()) == ([2], [0.5])
    assert shares(rows) == {"generate": 0, "reward": 0, "train": 0.75, "publish": 0, "other": 0.25}


def test_the_record_leads_to_the_tracker_and_the_plugin_imports_nothing_heavy() -> None:
    specs = {spec.name: spec for spec in miles_trackers()}
    assert sorted(specs) == ["curves", "mlflow", "tensorboard", "wandb"]
    assert specs["curves"].ref == f"{Curves.__module__}:{Curves.__name__}"
    script = (
        "import sys, miles_trackers, miles_trackers.options; "
        "assert not {'torch', 'numpy', 'matplotlib', 'ray', 'transformers', 'wandb', 'mlflow', 'tensorboard'} & "
        "{*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("bad", [{"every": -1}, {"smoothing": 0.5}])
def test_impossible_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        options.Curves(**bad)
