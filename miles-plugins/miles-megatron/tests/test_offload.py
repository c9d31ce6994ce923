"""Memory put aside and brought back: freed in between, and training goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_kit import exported, make_batch, make_model, make_trainer

from miles_megatron.offload import Offload


def test_views_of_one_memory_are_freed_and_come_back_together() -> None:
    whole = torch.arange(12.0)
    part, zeros = whole[3:7], torch.zeros(5)
    offload = Offload()
    offload.put([part, whole])
    offload.put([zeros], content=False)
    assert whole.untyped_storage().nbytes() == zeros.untyped_storage().nbytes() == 0
    offload.take()
    torch.testing.assert_close(whole, torch.arange(12.0))
    part += 1
    assert whole[3] == 4
    torch.testing.assert_close(zeros, torch.zeros(5))


@pytest.mark.parametrize("half", [False, True])
def test_a_trainer_that_slept_goes_on_with_the_same_numbers(tmp_path: Path, half: bool) -> None:
    model = make_model(tmp_path / "model")
    found = []
    for sleeps in (False, True):
        trainer = make_trainer(model, {"parallel": {"bf16": half}})
        for step in range(3):
            if sleeps:
                trainer._put_aside()  # what `sleep` does on a GPU
                assert not sum(p.untyped_storage().nbytes() for p in trainer._chunks[0].parameters())
                trainer.wake()
            metrics = trainer.update(make_batch(step), step, 1)
        found.append(
            (
                metrics["loss"],
                metrics["grad_norm"],
                {k: np.array(v) for k, v in exported(trainer).items()} if not half else {},
            )
        )
        trainer.stop()
    assert found[0][:2] == found[1][:2]
    for name, weight in found[0][2].items():
        np.testing.assert_array_equal(found[1][2][name], weight)
