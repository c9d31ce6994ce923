"""Memory that is given back comes again with what it held; so does that which a reference takes for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_kit import make_batch, make_model, make_trainer, stage


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


def test_the_reference_takes_the_place_of_the_policy_without_new_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(make_model(tmp_path / "model", num_hidden_layers=1))
    probe = make_batch(9)
    first = trainer.logprobs(probe, "policy", 0)
    trainer.update(make_batch(0), 0, 1)
    weights, places = [tensor.clone() for tensor in trainer._tensors()], addresses(trainer)
    np.testing.assert_array_equal(trainer.logprobs(probe, "reference", 1), first)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_column_of", lambda batch: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            trainer.logprobs(probe, "reference", 1)
    assert all(now.equal(before) for now, before in zip(trainer._tensors(), weights, strict=True))
    trained = trainer.logprobs(probe, "policy", 1)
    assert not np.array_equal(trained, first)
    trainer.begin(stage(trainer.options))
    np.testing.assert_array_equal(trainer.logprobs(probe, "reference", 1), trained)
    assert addresses(trainer) == places
    trainer.stop()


def addresses(trainer: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in trainer._reference.tensors]


def flat(trainer: Any) -> dict[str, Any]:
    return {name: bucket.flat.float().numpy().copy() for bucket in trainer.export() for name in bucket.names[:1]}
