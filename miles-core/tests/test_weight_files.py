"""Weights that a broken download left are refused before a process starts, by their files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from miles_core.config.model import folder_config
from miles_core.errors import UserError
from miles_core.run.weight_files import check_tensors, check_weights, tensors

torch = pytest.importorskip("torch")
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two files as transformers writes it."""
    from safetensors.torch import save_file

    save_file({"a": torch.ones(300), "b": torch.ones(2, 3)}, tmp_path / FIRST, {"format": "pt"})
    save_file({"c": torch.ones(0)}, tmp_path / SECOND)
    index = {"metadata": {}, "weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_what_the_library_writes_is_accepted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_weights(folder)
    assert {name: each["shape"] for name, each in tensors(folder / FIRST).items()} == {"a": [300], "b": [2, 3]}
    check_weights(tmp_path_factory.mktemp("new"))


def cut(size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:size])


def index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (cut(-1), rf"{FIRST} is damaged or incomplete: it has \d+ bytes of \d+; download the model again"),
        (cut(50), f"{FIRST} is damaged or incomplete: it has no header"),
        (cut(3), f"{FIRST} is damaged or incomplete"),
        (cut(0), f"{FIRST} is damaged or incomplete"),
        (lambda folder: (folder / FIRST).write_bytes(b"<html>Not found</html>"), "is damaged or incomplete"),
        (lambda folder: (folder / FIRST).write_bytes(bytes([2, *7 * [0]]) + b"[]"), "it has no header"),
        (lambda folder: (folder / SECOND).unlink(), f"lacks {SECOND}, which its model.safetensors.index.json names"),
        (index('{"weight_map": {"d": "' + FIRST + '"}}'), f"{FIRST} lacks the tensor d, which its model.safetensors"),
        (index('{"weight'), "index.json cannot be read: JSONDecodeError"),
        (index("[]"), "index.json cannot be read: TypeError"),
    ],
)
def test_damaged_files_are_refused(folder: Path, damage: Callable[[Path], object], error: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=error):
        check_weights(folder)


@pytest.mark.parametrize(
    ("expected", "ignored", "error"),
    [
        ({"a": (300,), "b": None, "c": (0,)}, [], ""),
        ({"a": (300,)}, ["b", "x|c"], ""),
        ({"a": (300,), "b": (2, 3), "c": (0,), "e": (1,), "d": None}, [], " lacks the tensor d and 1 more, which the "),
        ({"a": (300,)}, ["b", "."], ""),
        ({"bb": (300,)}, ["a", "b", "c"], " lacks the tensor bb, which the model's config.json asks for"),
        ({"b": (2, 3)}, ["aa"], " holds the tensor a and 1 more, which the model's config.json does not know"),
        ({"a": (300,), "b": (3, 2)}, ["c"], f"/{FIRST}: b has shape (2, 3), but the model's config.json makes it (3, "),
    ],
)
def test_other_tensors_than_those_of_the_model_are_refused(
    folder: Path, expected: dict[str, tuple[int, ...] | None], ignored: list[str], error: str
) -> None:
    if not error:
        check_tensors(folder, expected, ignored)
        return
    with pytest.raises(UserError) as refused:
        check_tensors(folder, expected, ignored)
    assert str(refused.value).startswith(f"{folder}{error}")


def test_the_plan_of_a_run_says_where_the_folder_is_named(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    assert folder_config(str(folder), "model.path", "run.toml:8") == {}
    cut(-1)(folder)
    with pytest.raises(UserError, match=rf"^run.toml:8: model folder .*{FIRST} is damaged or incomplete"):
        folder_config(str(folder), "model.path", "run.toml:8")
