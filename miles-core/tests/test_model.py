"""`prepare_model`: every run gets a Hugging Face folder, or a clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from miles_core.config.schema import ModelSection
from miles_core.errors import UserError
from miles_core.families import complete
from miles_core.run.model import prepare_model
from miles_core.run.tokenizers import load_tokenizer, make_tokenizer


class Family:
    """A family whose config has a width beside what every model has."""

    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        defaults = {
            "width": 8,
            "vocab_size": 1000,
            "max_position_embeddings": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
        }
        return {"model_type": "qwen3", **complete(defaults, config)}

    def parameters(self, config: Mapping[str, Any]) -> int:
        raise AssertionError("not asked for")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are looked up in the local cache only, so that the tests do not wait for a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_new_model_has_a_config_that_fits_its_tokenizer(tmp_path: Path) -> None:
    section = ModelSection(family="new", config={"width": 4}, tokenizer="ascii", max_tokens=77)
    folder = prepare_model(section, Family(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder)
    assert config["width"] == 4
    assert config["max_position_embeddings"] == 77
    assert config["vocab_size"] == max(tokenizer.encode("~"), default=0) + 4 == 99
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert config["bos_token_id"] is None
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_padded_vocabulary_is_kept_and_a_small_one_refused(tmp_path: Path) -> None:
    padded = ModelSection(family="new", config={"vocab_size": 128}, tokenizer="ascii")
    assert json.loads((prepare_model(padded, Family(), tmp_path) / "config.json").read_text())["vocab_size"] == 128
    small = ModelSection(family="new", config={"vocab_size": 50}, tokenizer="ascii")
    with pytest.raises(UserError, match="vocab_size = 50 is smaller than the 99 tokens"):
        prepare_model(small, Family(), tmp_path)


def test_a_field_that_the_family_does_not_know_is_refused(tmp_path: Path) -> None:
    section = ModelSection(family="new", config={"witdh": 4})
    with pytest.raises(
        UserError, match=r"\[model.config\] of family 'new': unknown field 'witdh'. Did you mean 'width'"
    ):
        prepare_model(section, Family(), tmp_path)


def test_an_existing_folder_is_used_as_it_is(tmp_path: Path) -> None:
    make_tokenizer("bytes", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert prepare_model(ModelSection(path=str(tmp_path)), None, Path("unused")) == tmp_path.resolve()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{"}, "is not JSON"),
        ({"config.json": "{}"}, "has no tokenizer"),
        ({"config.json": "{}", "pytorch_model.bin": "", "tokenizer.json": ""}, "weights only as pytorch_model.bin"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(files: dict[str, str], error: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=error):
        prepare_model(ModelSection(path=str(tmp_path)), None, tmp_path)


@pytest.mark.usefixtures("no_hub")
def test_a_hub_model_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="'org/none' is not an existing folder, and cannot be had from the Hugging Face"
    ):
        prepare_model(ModelSection(path="org/none"), None, tmp_path)


@pytest.mark.usefixtures("no_hub")
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither an existing folder nor a name on the Hugging Face hub"):
        prepare_model(ModelSection(path=str(tmp_path / "no" / "such")), None, tmp_path)


def test_preparing_a_new_model_imports_no_torch(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_model import Family, ModelSection, prepare_model
prepare_model(ModelSection(family="new"), Family(), Path({str(tmp_path)!r}))
assert not {{"torch", "transformers"}} & {{*sys.modules}}
"""
    subprocess.run([sys.executable, "-c", script], check=True)
