"""The tracker `wandb` without a network, its files read back record by record."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from read_back import info, wandb_exits, wandb_history, wandb_runs

from miles_core.errors import MissingExtraError, UserError
from miles_trackers import options
from miles_trackers.wandb import WandB

OPTIONS = options.WandB(
    mode="offline", group="night", tags=("a", "b"), settings={"silent": True, "x_disable_stats": True}
)


def log(tracker: WandB, steps: range, more: float = 0.0) -> None:
    for step in steps:
        tracker.log(step, {"reward": step + more})
    tracker.finish()


def rewards(folder: Path) -> list[tuple[int, float]]:
    return [(int(row["_step"]), float(row["reward"])) for row in wandb_history(folder) if "reward" in row]


def test_the_run_folder_holds_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tracker = WandB(OPTIONS, info(tmp_path))
    tracker.log(0, {"eval/reward": 0.125})
    tracker.log(6, {"reward": 0.25, "mismatch/kl": 1e-6})
    tracker.log(7, {"reward": 0.5})
    tracker.log(7, {"eval/reward": 0.75})
    tracker.finish()
    rows = [
        {name: json.loads(value) for name, value in row.items() if name not in ("_runtime", "_timestamp")}
        for row in wandb_history(tmp_path)
    ]
    assert rows == [
        {"_step": 0, "eval/reward": 0.125},
        {"_step": 6, "reward": 0.25, "mismatch/kl": 1e-6},
        {"_step": 7, "reward": 0.5, "eval/reward": 0.75},
    ]
    (run,) = wandb_runs(tmp_path)
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("miles", "test", "night", ["a", "b"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["loss"] == {"name": "grpo", "clip_high": 0.28}
    assert wandb_exits(tmp_path) == [0]


def test_after_a_resume_it_is_the_same_run_and_no_step_is_there_twice(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    log(WandB(OPTIONS, info(tmp_path)), range(7))
    log(WandB(OPTIONS, replace(info(tmp_path), resumed=4)), range(5, 8), more=100.0)
    first, second = wandb_runs(tmp_path)
    assert first.run_id == second.run_id
    assert rewards(tmp_path) == [(step, float(step) if step < 5 else 100.0 + step) for step in range(8)]
    assert wandb_exits(tmp_path) == [1, 0]  # the first did not come to its last step


def test_a_run_that_begins_again_is_another_one(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    log(WandB(OPTIONS, info(tmp_path)), range(2))
    log(WandB(OPTIONS, info(tmp_path)), range(1))
    first, second = wandb_runs(tmp_path)
    assert first.run_id != second.run_id
    assert not second.HasField("branch_point")


def test_who_is_not_logged_in_hears_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"(?s)wandb login.*WANDB_MODE=offline"):
        WandB(options.WandB(mode="online", settings={"silent": True}), info(tmp_path))


def test_a_setting_that_is_none_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with pytest.raises(UserError, match="run_nmae"):
        WandB(options.WandB(mode="offline", settings={"run_nmae": "x"}), info(tmp_path))


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError) as caught:
        WandB(OPTIONS, info(tmp_path))
    assert str(caught.value) == (
        "tracker wandb needs wandb, which is not installed: pip install 'miles-trackers[wandb]'"
    )
