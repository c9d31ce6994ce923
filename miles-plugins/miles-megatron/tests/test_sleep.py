"""Memory that is given back comes again with what it held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_kit import make_batch, make_model, make_trainer


@pytest.mark.parametrize("parallel", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
def test_training_goes_on_after_a_sleep_as_if_there_had_been_none(
    tmp_path: Path, parallel: dict[str, Any], distributed: bool
) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    found = []
    for sleeps in (False, True):
        options = {"parallel": parallel, "ddp": {"use_distributed_optimizer": distributed}}
        trainer = make_trainer(folder, options)
        metrics = [dict(trainer.update(make_batch(0), 0, 1))]
        if sleeps:
            trainer.sleep()
            trainer.sleep()  # twice is once
            assert not any(tensor.untyped_storage().size() for tensor in [*trainer._kept(), *trainer._gradients()])
            trainer.wake()
        metrics.append(dict(trainer.update(make_batch(1), 1, 1)))
        found.append((metrics, flat(trainer)))
        trainer.stop()
    (first, one), (second, two) = found
    assert [step["loss"] for step in first] == [step["loss"] for step in second]
    assert all(np.array_equal(one[name], two[name]) for name in one)


def flat(trainer: Any) -> dict[str, Any]:
    return {name: bucket.flat.float().numpy().copy() for bucket in trainer.export() for name in bucket.names[:1]}
