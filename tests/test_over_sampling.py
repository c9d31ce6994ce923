"""More prompts than are needed, with the real engine: the slow ones are ended there and drawn again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import one_process
import pytest
from run_kit import MODEL

from miles_core.run.progress import Progress
from miles_core.sample import Group
from miles_torch.scheduler import Scheduler

RUN = (
    """
[data]
name = "jsonl"
path = "data.jsonl"
[reward]
name = "even"
[sampling]
max_new_tokens = 24
[engine]
name = "torch"
max_batch = 4
[trainer]
name = "torch"
[advantage]
name = "grpo"
[loss]
name = "grpo"
[schedule]
steps = 4
prompts_per_step = 2
samples_per_prompt = 2
over_sample = 3
"""
    + MODEL
)
"""The engine generates two of the five prompts at a time."""


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_slow_ones_are_ended_in_the_engine_and_drawn_again(
    staleness: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    ended: list[str] = []
    hand_over, abort = Progress.hand_over, Scheduler.abort

    def handed_over(self: Progress, groups: Iterable[int]) -> list[Group]:
        trained.extend(groups := list(groups))
        return hand_over(self, groups)

    def aborted(self: Scheduler, ids: Iterable[str] | None) -> object:
        ended.extend(ids := list(ids or ()))
        return abort(self, ids)

    monkeypatch.setattr(Progress, "hand_over", handed_over)
    monkeypatch.setattr(Scheduler, "abort", aborted)
    rows = [json.dumps({"prompt": f"{number} + 1 =", "answer": number + 1}) for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    steps = one_process.train("run.toml", [f"schedule.max_staleness={staleness}"], one_process.catalog(), monkeypatch)
    assert len(trained) == len(set(trained)) == 8
    assert all(step["staleness/max"] <= staleness for step in steps)
    thrown_back = [step["oversampled"] for step in steps]
    if staleness == 0:
        assert thrown_back == [3.0] * 4, "five prompts a step, of which two are trained on"
        assert max(trained) < 2 * 4 + 3, "what is thrown back is drawn before new prompts"
        assert ended, "two prompts are done while others have not begun to be generated"
