"""Checkpoints of one layout under another: the same parameters and optimizer state, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_kit import make_model, make_trainer, run_jobs
from safetensors.numpy import load_file

from miles_core.errors import UserError
from miles_megatron import start

pytestmark = pytest.mark.timeout(900)  # many processes start, on few cores

TENSOR = {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
PIPELINE = {"parallel": {"pipeline_model_parallel_size": 2}}
EXPERT_PIPELINE = {"parallel": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}}
VIRTUAL = {
    "parallel": {
        **PIPELINE["parallel"],
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }
}
FEW = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
FURTHER = {"num_nextn_predict_layers": 1}
FAMILIES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "qwen3": (VIRTUAL, {"num_hidden_layers": 4}),
    "qwen2": (PIPELINE, {}),
    "llama": (PIPELINE, {}),
    "deepseek-v3": (EXPERT_PIPELINE, {**FEW, **FURTHER}),
    "glm4-moe": (EXPERT_PIPELINE, {**FEW, **FURTHER}),
    "kimi-k2": (EXPERT_PIPELINE, FEW),
}
"""Name of a model -> the layout of four ranks to which its checkpoint goes from two tensor-parallel ones, and what its
config.json says besides. Of `qwen3-moe` everything else here is shown."""


def plain(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole. Needs a process group."""
    from megatron.core import dist_checkpointing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dist_checkpointing.load_plain_tensors(str(folder / "trainer" / "dist"))
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Trained at TP2, saved in the background and trained on; loaded at PP2 x EP2 and saved again; loaded at TP2 and
    saved a third time."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = str(make_model(folder / "model", "qwen3-moe"))

    def job(options: dict[str, Any], load: str, save: str, seeds: list[int]) -> dict[str, Any]:
        found: dict[str, Any] = {"model": model, "options": options, "seeds": seeds}
        found |= {"save": str(folder / save / "trainer")} if save else {}
        return found | ({"restore": str(folder / load / "trainer")} if load else {})

    beside = {"checkpoint": {"async_save": True, "verify_integrity": True}, **TENSOR}
    writing = job(beside, "", "first", [0, 1]) | {"meanwhile": [2]}
    converted = {"model": str(folder / "converted"), "seeds": []}
    start.prepare()
    from miles_megatron.convert import hf_to_dist

    hf_to_dist(Path(model), folder / "converted")
    families = [family_jobs(folder, name) for name in FAMILIES]
    jobs = [writing, job(beside, "first", "", [2]), {**converted, "options": TENSOR}]
    first, on, halves, *on_two = run_jobs(folder / "a", 2, [*jobs, *(own for own, _ in families)])
    jobs = [job(EXPERT_PIPELINE, "first", "second", []), job(EXPERT_PIPELINE, "first", "", [2])]
    jobs = [*jobs, {**converted, "options": EXPERT_PIPELINE}, *(own for _, own in families)]
    second, other, quarters, *on_four = run_jobs(folder / "b", 4, jobs)
    (third,) = run_jobs(folder / "c", 2, [job(TENSOR, "second", "third", [])])
    of_families = dict(zip(FAMILIES, zip(on_two, on_four, strict=True), strict=True))
    loaded = {"halves": halves, "quarters": quarters, "families": of_families}
    return loaded | {"folder": folder, "first": first, "second": second, "third": third, "on": on, "other": other}


def family_jobs(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step on two tensor-parallel ranks and a checkpoint; and that checkpoint loaded on four and saved again."""
    layout, changes = FAMILIES[name]
    base = folder / name
    model = str(make_model(base / "model", name, **{"num_hidden_layers": 2, **changes}))
    further = {"transformer": {"mtp_num_layers": 1}} if changes.keys() >= FURTHER.keys() else {}
    first, second = (str(base / which / "trainer") for which in ("first", "second"))
    return (
        {"model": model, "options": {**TENSOR, **further}, "seeds": [0], "save": first},
        {"model": model, "options": {**layout, **further}, "seeds": [], "restore": first, "save": second},
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_checkpoint_goes_to_another_layout_bit_for_bit(saved: dict[str, Any], name: str) -> None:
    trained, loaded = saved["families"][name]
    original = load_file(saved["folder"] / name / "model" / "model.safetensors")
    assert trained["weights"].keys() == loaded["weights"].keys() == original.keys()
    assert all(np.array_equal(loaded["weights"][weight], own) for weight, own in trained["weights"].items())
    assert any(not np.array_equal(original[weight], own) for weight, own in trained["weights"].items())
    trainer = make_trainer(saved["folder"] / name / "model")  # for its process group
    first, second = (plain(saved["folder"] / name / which) for which in ("first", "second"))
    trainer.stop()
    assert sum("exp_avg_sq" in key for key in first) >= 8
    assert second.keys() == first.keys()
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())


def test_converted_weights_load_under_every_layout(saved: dict[str, Any]) -> None:
    weights = load_file(saved["folder"] / "model" / "model.safetensors")
    for which in ("halves", "quarters"):
        assert saved[which]["weights"].keys() == weights.keys()
        assert all(np.array_equal(saved[which]["weights"][name], weights[name]) for name in weights)


def test_weights_are_the_same_under_another_layout_and_back(saved: dict[str, Any]) -> None:
    weights = saved["first"]["weights"]
    for which in ("second", "third"):
        assert saved[which]["weights"].keys() == weights.keys()
        assert all(np.array_equal(saved[which]["weights"][name], weights[name]) for name in weights)


def test_optimizer_state_and_reference_are_the_same_under_another_layout_and_back(saved: dict[str, Any]) -> None:
    trainer = make_trainer(saved["folder"] / "model")  # for its process group
    first, second, third = (plain(saved["folder"] / name) for name in ("first", "second", "third"))
    trainer.stop()
    assert any("exp_avg_sq" in name for name in first)
    assert any(name.startswith("reference.") for name in first)
    for other in (second, third):
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_what_is_trained_while_a_checkpoint_is_written_is_not_in_it(saved: dict[str, Any]) -> None:
    meanwhile, on = saved["first"]["meanwhile"], saved["on"]
    (one,), (two,) = meanwhile["metrics"], on["metrics"]
    assert {**one, "train_seconds": 0} == {**two, "train_seconds": 0}
    for name, weight in meanwhile["weights"].items():
        np.testing.assert_array_equal(on["weights"][name], weight)
        assert not np.array_equal(saved["first"]["weights"][name], weight), name


def test_training_goes_on_alike_under_both(saved: dict[str, Any]) -> None:
    (one,), (two,) = saved["on"]["metrics"], saved["other"]["metrics"]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert one[name] == pytest.approx(two[name], rel=1e-5), name
    np.testing.assert_allclose(saved["on"]["after"][0], saved["other"]["after"][0], atol=1e-4)
    np.testing.assert_allclose(saved["on"]["after"][1], saved["first"]["before"], atol=1e-5)  # the reference came along


def test_a_checkpoint_of_another_model_is_refused(saved: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(make_model(tmp_path / "model", "qwen3"))
    with pytest.raises(
        UserError, match=r"dist lacks the tensor decoder\.layers\.mlp\.linear_fc1\.layer_norm_weight and"
    ):
        trainer.restore(saved["folder"] / "first" / "trainer")


def test_what_is_no_checkpoint_is_refused(saved: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "trainer"
    shutil.copytree(saved["folder"] / "first" / "trainer", folder)
    shutil.rmtree(folder / "dist")
    trainer = make_trainer(saved["folder"] / "model")
    with pytest.raises(UserError, match="holds no checkpoint in Megatron's distributed format"):
        trainer.restore(folder)


def test_of_two_that_are_being_written_each_keeps_its_own_contents(
    saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.multiprocessing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from miles_megatron import checkpoint

    second_ended = torch.multiprocessing.get_context("fork").Event()
    write = FileSystemWriterAsync.write_preloaded_data_multithread

    def in_turn(transforms: Any, use_msc: Any, rank: int, buckets: Any, results: Any) -> None:
        first = "/first/" in buckets[0][0]
        assert not first or second_ended.wait(300)
        write(transforms, use_msc, rank, buckets, results)
        if not first:
            second_ended.set()

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data_multithread", staticmethod(in_turn))
    trainer = make_trainer(saved["folder"] / "model")  # for its process group
    tensors = {"first": {"a": torch.arange(3.0), "b": torch.arange(100.0)}, "second": {"b": torch.ones(7)}}
    pending = [
        checkpoint.write(
            {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in named.items()},
            tmp_path / which,
            {"async_save": True},
            copies=[which],
        )
        for which, named in tensors.items()
    ]
    assert all(written is not None and written(True) for written in pending)
    for which, named in tensors.items():
        assert checkpoint.copies(tmp_path / which) == [which]
        empty = {name: ShardedTensor.from_rank_offsets(name, torch.zeros_like(one)) for name, one in named.items()}
        read = checkpoint.read(empty, tmp_path / which, {})
        assert all(torch.equal(read[name], tensor) for name, tensor in named.items())
    trainer.stop()
