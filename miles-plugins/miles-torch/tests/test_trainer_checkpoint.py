"""Checkpoints and exports of the trainer."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_kit import VOCABULARY, exported, make_batch, make_trainer, tiny_model
from trainer_rank import train, train_on_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from miles_core.errors import UserError
from miles_torch import checkpoint, export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_a_run_goes_on_bit_for_bit_in_a_new_process(folder, tmp_path):
    whole = train(str(folder), seeds=[0, 1, 2, 3], save=str(tmp_path / "whole"))
    train(str(folder), seeds=[0, 1], save=str(tmp_path / "half"))
    (rest,) = train_on_ranks(
        tmp_path,
        1,
        [{"model": str(folder), "seeds": [2, 3], "restore": str(tmp_path / "half"), "save": str(tmp_path / "rest")}],
    )
    for mine, other in zip(rest["metrics"], whole["metrics"][2:], strict=True):
        assert {**mine, "train_seconds": 0} == {**other, "train_seconds": 0}
    for stem in ("weights-00000", "optimizer-00000", "reference-00000"):
        found = load_file(tmp_path / "rest" / f"{stem}.safetensors")
        expected = load_file(tmp_path / "whole" / f"{stem}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), stem


def test_random_states_come_back(folder, tmp_path):
    trainer = make_trainer(folder)
    trainer.update(make_batch(), 0, 1)
    trainer.save(tmp_path)
    expected = torch.rand(3)
    torch.rand(100)
    make_trainer(folder).restore(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_holds_safetensors_and_json_only(folder, tmp_path):
    trainer = make_trainer(folder)
    trainer.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    fresh = make_trainer(folder)
    fresh.restore(tmp_path)  # before the first step there is no optimizer state
    assert fresh.update(make_batch(), 0, 1)["loss"] == trainer.update(make_batch(), 0, 1)["loss"]


def test_large_checkpoints_are_split(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 4000)
    trainer = make_trainer(folder)
    trainer.update(make_batch(), 0, 1)
    trainer.save(tmp_path)
    assert len(list(tmp_path.glob("weights-*"))) > 3
    fresh = make_trainer(folder)
    fresh.restore(tmp_path)
    assert fresh.update(make_batch(1), 1, 1)["loss"] == trainer.update(make_batch(1), 1, 1)["loss"]


@pytest.mark.parametrize("change", ["shape", "missing", "stage"])
def test_a_checkpoint_of_another_run_is_refused(folder, tmp_path, change):
    trainer = make_trainer(folder)
    trainer.save(tmp_path)
    path = tmp_path / "weights-00000.safetensors"
    weights = load_file(path)
    if change == "shape":
        weights["model.norm.weight"] = torch.zeros(3)
    elif change == "missing":
        del weights["model.norm.weight"]
    else:
        (tmp_path / "trainer.json").write_text(json.dumps({"stage": "other", "optimizer_steps": 0}))
    save_file(weights, path)
    with pytest.raises(UserError, match=r"stage 'other'" if change == "stage" else r"weights.*'model\.norm\.weight'"):
        make_trainer(folder).restore(tmp_path)


def test_a_full_disk_is_an_os_error(folder, tmp_path):
    """A file-size limit stands in for the full disk: the write fails in the same place."""
    import resource
    import signal

    trainer = make_trainer(folder)
    trainer.update(make_batch(), 0, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for save in (trainer.save, trainer.save_pretrained):
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
                save(tmp_path / save.__name__)
            assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "save" / "trainer.json").exists()
    trainer.save(tmp_path / "save")  # it goes on
    make_trainer(folder).restore(tmp_path / "save")


@pytest.mark.parametrize("tied", [True, False])
def test_the_export_is_a_folder_that_transformers_loads_and_generates_with(tmp_path, tied):
    folder = tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    trainer = make_trainer(folder)
    trainer.update(make_batch(), 0, 1)
    trainer.save_pretrained(tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert model.config._attn_implementation == "sdpa"
    assert ("lm_head.weight" in exported(trainer)) != tied
    prompt = tokenizer("5 17 3 40", return_tensors="pt").input_ids
    assert prompt.tolist() == [[5, 17, 3, 40]]
    found = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    live = trainer._policy.model
    live.set_attn_implementation("sdpa")
    expected = prompt[0].tolist()
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(live(torch.tensor([expected])).logits[0, -1].argmax()))
    assert found == expected


def test_a_trainer_starts_from_an_exported_folder(folder, tmp_path):
    trainer = make_trainer(folder)
    trainer.update(make_batch(), 0, 1)
    trainer.save_pretrained(tmp_path)
    loaded = exported(make_trainer(tmp_path))
    for name, tensor in exported(trainer).items():
        assert torch.equal(loaded[name], tensor)


def test_buckets_hold_every_weight_once_and_follow_the_layout(folder, monkeypatch):
    monkeypatch.setattr(export, "BUCKET_BYTES", 4 * VOCABULARY * 32)
    trainer = make_trainer(folder)
    layout = trainer.layout()
    buckets = list(trainer.export())
    assert [(bucket.names, bucket.shapes) for bucket in buckets] == [(part.names, part.shapes) for part in layout]
    assert len(buckets) > 3
    assert all(bucket.flat.nbytes <= 4 * VOCABULARY * 32 for bucket in buckets)
    state = trainer._policy.model.state_dict()
    names = [name for part in layout for name in part.names]
    assert sorted(names) == sorted(set(state) - {"lm_head.weight"})
    for name, tensor in exported(trainer).items():
        assert torch.equal(tensor, state[name])
