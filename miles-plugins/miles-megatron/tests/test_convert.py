"""`miles convert`: Hugging Face to Megatron's distributed format and back, bit for bit, a part in memory at a time."""

from __future__ import annotations

import gc
import json
import pickle
import resource
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_kit import make_critic, make_model, make_trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from miles_core.cli.main import main
from miles_core.errors import UserError
from miles_megatron import start


@pytest.fixture(autouse=True)
def prepared() -> None:
    start.prepare()


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def change(folder: Path, **types: torch.dtype) -> None:
    """Gives tensors other types; "" those of all others."""
    held = load_file(folder / "model.safetensors")
    for name, tensor in held.items():
        dtype = next((types[part] for part in types if part and part in name), types.get("rest", tensor.dtype))
        held[name] = tensor.to(dtype)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {}),
        ("qwen2", {}),
        ("qwen3-moe", {"tie_word_embeddings": True}),
        ("deepseek-v3", {"num_nextn_predict_layers": 1}),
    ],
)
def test_there_and_back_is_bit_for_bit(
    tmp_path: Path, name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from miles_megatron import convert, pretrained

    monkeypatch.setattr(convert, "BUCKET_BYTES", 20_000)  # many buckets
    monkeypatch.setattr(pretrained, "FILE_BYTES", 60_000)  # and several files
    folder = make_model(tmp_path / "model", name, **changes)
    change(folder, rest=torch.bfloat16, correction=torch.float32)
    convert.hf_to_dist(folder, tmp_path / "dist")
    convert.dist_to_hf(tmp_path / "dist", tmp_path / "again")
    before, after = tensors(folder), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(before[name].equal(after[name]) for name in before)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "dist", "model"]


def test_a_run_begins_with_converted_weights_and_its_checkpoint_can_be_converted(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3-moe")
    assert main(["convert", "hf-to-dist", str(folder), str(tmp_path / "dist")]) == 0
    trainer = make_trainer(tmp_path / "dist")
    trainer.save_pretrained(tmp_path / "policy")
    trainer.save(tmp_path / "trainer")
    trainer.stop()
    assert main(["convert", "dist-to-hf", str(tmp_path / "trainer"), str(tmp_path / "again")]) == 0
    before = tensors(folder)
    for other in ("policy", "again"):
        after = tensors(tmp_path / other)
        assert before.keys() == after.keys()
        assert all(before[name].equal(after[name]) for name in before)


def test_no_more_than_one_parameter_is_in_memory_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_megatron import convert
    from miles_megatron.weights import Folder

    alive: dict[int, int] = {}
    most = 0
    read = Folder.get

    def get(self: Folder, name: str, shape: tuple[int, ...]) -> Tensor:
        nonlocal most
        tensor = read(self, name, shape).clone()  # without the file behind it
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        most = max(most, sum(alive.values()))
        return tensor

    monkeypatch.setattr(Folder, "get", get)
    folder = make_model(tmp_path / "model", "llama", num_hidden_layers=12)
    convert.hf_to_dist(folder, tmp_path / "dist")
    largest = 2 * 64 * 32 * 4  # gate and up
    assert largest <= most <= 2 * largest
    assert sum(tensor.nbytes for tensor in tensors(folder).values()) > 20 * largest


def bytes_in_memory() -> int:
    """Of all tensors that are not frozen, each storage once."""
    found = (each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.device.type == "cpu")
    storages = [each.untyped_storage() for each in found]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_no_more_than_a_bucket_and_a_file_are_in_memory_while_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miles_megatron import checkpoint, convert, pretrained

    folder = make_model(tmp_path / "model", "llama", num_hidden_layers=12)
    convert.hf_to_dist(folder, tmp_path / "dist")
    bucket = file = 40_000
    monkeypatch.setattr(convert, "BUCKET_BYTES", bucket)
    monkeypatch.setattr(pretrained, "FILE_BYTES", file)
    read, held = checkpoint.read, []

    def measured(*args: Any, **kwargs: Any) -> Any:
        loaded = read(*args, **kwargs)
        held.append(bytes_in_memory())  # what is there most: a bucket is full, and a file not yet written
        return loaded

    monkeypatch.setattr(checkpoint, "read", measured)
    gc.freeze()  # what is there already
    try:
        convert.dist_to_hf(tmp_path / "dist", tmp_path / "again")
    finally:
        gc.unfreeze()
    size = sum(tensor.nbytes for tensor in tensors(folder).values())
    largest = 2 * 64 * 32 * 4  # gate and up: a file may have begun with one of them, which keeps both
    assert bucket / 2 < max(held) <= bucket + file + largest < size / 4


def damaged(folder: Path, damage: str) -> None:
    held = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        return
    if damage == "missing":
        del held[name]
    elif damage == "extra":
        held["model.odd.weight"] = torch.ones(2)
    elif damage == "shape":
        held[name] = torch.ones(3, 5)
    elif damage == "types":
        held[name] = held[name].bfloat16()
    save_file(held, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ("truncated", "model.safetensors is damaged or incomplete: .*; download the model again"),
        ("missing", "lacks the tensor model.layers.1.mlp.up_proj.weight, which the model's config.json asks for"),
        ("extra", "holds the tensor model.odd.weight, which the model's config.json does not know"),
        ("shape", r"model.layers.1.mlp.up_proj.weight has shape \(3, 5\), but the model's config.json makes it \(64, "),
        ("types", "up_proj.weight must be of one type, and are .*bfloat16.*float32"),
    ],
)
def test_a_damaged_folder_is_refused_and_leaves_nothing(tmp_path: Path, damage: str, error: str) -> None:
    from miles_megatron import convert

    folder = make_model(tmp_path / "model")
    damaged(folder, damage)
    with pytest.raises(UserError, match=error):
        convert.hf_to_dist(folder, tmp_path / "dist")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_an_error_for_people_and_leaves_nothing(tmp_path: Path) -> None:
    from miles_megatron import convert

    folder = make_model(tmp_path / "model")
    before, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(UserError, match="dist cannot be written: "):
            convert.hf_to_dist(folder, tmp_path / "dist")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Calls:
    """A pickle of it calls a function when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_checkpoint_whose_contents_would_call_something_is_refused_uncalled(tmp_path: Path) -> None:
    from miles_megatron import convert

    convert.hf_to_dist(make_model(tmp_path / "model"), tmp_path / "dist")
    contents, called = tmp_path / "dist/dist/.metadata", tmp_path / "called"
    contents.write_bytes(pickle.dumps(Calls(called)))
    with pytest.raises(UserError, match=r"\.metadata cannot be read: it names .*, which has no place there"):
        convert.dist_to_hf(tmp_path / "dist", tmp_path / "hf")
    with pytest.raises(UserError, match="which has no place there"):
        make_trainer(tmp_path / "dist")
    assert not called.exists()


def test_a_checkpoint_whose_common_part_would_call_something_is_refused_uncalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miles_megatron import checkpoint, convert

    called = tmp_path / "called"
    monkeypatch.setattr(checkpoint, "content", lambda _: {"copies": Calls(called)})
    convert.hf_to_dist(make_model(tmp_path / "model"), tmp_path / "dist")
    with pytest.raises(UserError, match="dist cannot be loaded: it holds something that"):
        convert.dist_to_hf(tmp_path / "dist", tmp_path / "hf")
    with pytest.raises(UserError, match="dist cannot be loaded: it holds something that"):
        make_trainer(tmp_path / "dist")
    assert not called.exists()


def test_a_checkpoint_whose_files_are_not_whole_is_refused(tmp_path: Path) -> None:
    from miles_megatron import convert

    convert.hf_to_dist(make_model(tmp_path / "model"), tmp_path / "dist")
    (path,) = (tmp_path / "dist/dist").glob("*.distcp")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    error = rf"{path.name} is damaged or incomplete: it has {len(whole) - 1000} bytes of {len(whole)}"
    with pytest.raises(UserError, match=error):
        convert.dist_to_hf(tmp_path / "dist", tmp_path / "hf")
    path.unlink()
    error = f"dist lacks the file {path.name}: the checkpoint is incomplete"
    with pytest.raises(UserError, match=error):
        convert.dist_to_hf(tmp_path / "dist", tmp_path / "hf")
    with pytest.raises(UserError, match=error):
        make_trainer(tmp_path / "dist")


def test_a_damaged_table_of_contents_is_refused(tmp_path: Path) -> None:
    from miles_megatron import checkpoint

    (tmp_path / ".metadata").write_bytes(b"xx")
    with pytest.raises(UserError, match=r"\.metadata cannot be read: invalid load key"):
        checkpoint.contents(tmp_path)


def test_a_critic_is_refused(tmp_path: Path) -> None:
    from miles_megatron import convert

    critic = make_critic(make_model(tmp_path / "model"))
    critic.save(tmp_path / "critic")
    critic.stop()
    with pytest.raises(UserError, match="critic holds a critic, which Hugging Face's format has no model for"):
        convert.dist_to_hf(tmp_path / "critic", tmp_path / "hf")


def refusals(tmp_path: Path) -> Iterator[tuple[list[str], str]]:
    folder, unknown, empty = tmp_path / "model", tmp_path / "unknown", tmp_path / "empty"
    for made in (folder, unknown, empty):
        made.mkdir()
    (unknown / "config.json").write_text(json.dumps({"architectures": ["OddForCausalLM"]}))
    save_file({"weight": torch.ones(2)}, unknown / "model.safetensors")
    yield ["hf-to-dist", str(folder), str(empty)], f"{empty} exists already; remove it, or name another folder"
    yield ["hf-to-dist", str(folder), str(tmp_path / "new")], f"{folder} has no weights (*.safetensors)"
    yield ["dist-to-hf", str(folder), str(tmp_path / "new")], f"{folder} holds no checkpoint in Megatron's distributed"
    yield ["hf-to-dist", str(unknown), str(tmp_path / "new")], "no installed model family covers OddForCausalLM"


def test_what_cannot_be_converted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, error in refusals(tmp_path):
        assert main(["convert", *words]) == 2
        assert error in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "new").exists()
