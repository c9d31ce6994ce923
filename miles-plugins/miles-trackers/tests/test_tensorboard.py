"""The tracker `tensorboard`, read back by TensorBoard's own event reader."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from read_back import info, tensorboard_points

from miles_core.errors import MissingExtraError
from miles_trackers import options
from miles_trackers.tensorboard import TensorBoard

OPTIONS = options.TensorBoard()


def test_tensorboard_shows_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = TensorBoard(OPTIONS, info(tmp_path))
    tracker.log(0, {"eval/reward": 0.125})
    for step in (1, 2):
        tracker.log(step, {"reward": step / 4, "mismatch/kl": math.nan if step == 1 else 1e-6})
    tracker.log(2, {"eval/reward": 0.5})
    tracker.finish()
    assert tensorboard_points(tmp_path / "tensorboard", "reward") == [(1, 0.25), (2, 0.5)]
    assert tensorboard_points(tmp_path / "tensorboard", "eval/reward") == [(0, 0.125), (2, 0.5)]
    (first, kl), (second, small) = tensorboard_points(tmp_path / "tensorboard", "mismatch/kl")
    assert (first, second) == (1, 2)
    assert math.isnan(kl)
    assert small == pytest.approx(1e-6)


def test_what_is_logged_is_on_the_disk_at_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = TensorBoard(OPTIONS, info(tmp_path))
    tracker.log(1, {"reward": 1.0})
    assert tensorboard_points(tmp_path / "tensorboard", "reward") == [(1, 1.0)]
    tracker.finish()


@pytest.mark.parametrize("resumed", [4, 6, None])
def test_after_a_resume_no_step_is_there_twice(tmp_path: Path, resumed: int | None) -> None:
    pytest.importorskip("tensorboard")
    crashed = TensorBoard(OPTIONS, info(tmp_path))
    for step in range(7):
        crashed.log(step, {"reward": float(step)})  # and nobody calls `finish`
    begin = 0 if resumed is None else resumed + 1
    again = TensorBoard(OPTIONS, replace(info(tmp_path), resumed=resumed))
    for step in range(begin, 8):
        again.log(step, {"reward": 100.0 + step})
    again.finish()
    expected = [(step, float(step) if step < begin else 100.0 + step) for step in range(8)]
    assert tensorboard_points(tmp_path / "tensorboard", "reward") == expected


def test_runs_may_lie_together_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for name in ("one", "two"):
        tracker = TensorBoard(options.TensorBoard(logdir=str(tmp_path / "all")), info(tmp_path, name=name))
        tracker.log(1, {"reward": float(len(name))})
        tracker.finish()
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["one", "two"]
    assert tensorboard_points(tmp_path / "all/two", "reward") == [(1, 3.0)]


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError) as caught:
        TensorBoard(OPTIONS, info(tmp_path))
    assert str(caught.value) == (
        "tracker tensorboard needs tensorboard, which is not installed: pip install 'miles-trackers[tensorboard]'"
    )
