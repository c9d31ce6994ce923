"""Making and loading tokenizers. The reference is transformers' own `AutoTokenizer`."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from miles_core.errors import UserError
from miles_core.run.tokenizers import EOS, load_tokenizer, make_tokenizer, numbered_tokens, tokenizer_mismatch


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("bytes", "ascii")}
    for name, folder in folders.items():
        make_tokenizer(name, folder)
    return folders


def test_byte_tokens_are_the_bytes_and_any_text_comes_back(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["bytes"])

    @given(st.text())
    def check(text: str) -> None:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert tokens == list(text.encode())
        assert tokenizer.decode(tokens) == text

    check()


def test_bytes_that_are_no_text_decode_to_replacement_characters(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["bytes"])
    data = b"caf\xc3 \xff"
    assert tokenizer.decode(list(data)) == data.decode(errors="replace")


def test_ascii_has_one_token_a_character_and_text_comes_back(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["ascii"])
    alphabet = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace) | {" "}))

    @given(st.text(alphabet))
    def check(text: str) -> None:
        tokens = tokenizer.encode(text)
        assert len(tokens) == len(text)
        assert tokenizer.decode(tokens) == text

    check()
    assert len({*tokenizer.encode(alphabet)}) == len(alphabet) == 96
    assert tokenizer.decode(tokenizer.encode("2 × 3")) == "2 <|unknown|><|unknown|> 3"


@pytest.mark.parametrize("name", ["bytes", "ascii"])
def test_the_end_token_is_special_and_the_fields_for_the_model_are_right(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    fields = make_tokenizer(name, tmp_path)
    tokenizer = load_tokenizer(folders[name])
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (fields["eos_token_id"], fields["pad_token_id"])
    tokens = [*tokenizer.encode("1 + 1 = 2"), fields["eos_token_id"]]
    assert max(tokens) < fields["vocab_size"] == {"bytes": 258, "ascii": 99}[name]
    assert tokenizer.decode(tokens) == "1 + 1 = 2" + EOS
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "1 + 1 = 2"


@pytest.mark.parametrize("name", ["bytes", "ascii"])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "qwen3_moe", "llama"])
def test_transformers_loads_the_same_tokenizer_beside_any_model(name: str, model_type: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_tokenizer(name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    reference, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    text = "What is 12 + 30?\n\n Answer:  it's 42 ."
    assert ours.encode(text) == reference.encode(text)
    assert reference.decode(reference.encode(text)) == text
    assert reference.eos_token_id == ours.eos_token_id


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no tokenizer \(none of tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    make_tokenizer("bytes", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_an_unknown_tokenizer_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'bytes'"):
        make_tokenizer("byte", tmp_path)


def test_making_a_tokenizer_does_not_import_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from miles_core.run.tokenizers import make_tokenizer; "
        f"make_tokenizer('bytes', Path({str(tmp_path)!r})); "
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- A policy and its teacher ----------------------------------------------------------------------------------------


def test_the_numbers_of_tokens_are_those_of_transformers(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        assert numbered_tokens(folder) == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_a_unigram_model_numbers_its_tokens_by_their_order(tmp_path: Path) -> None:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    made.add_special_tokens(["<end>"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert numbered_tokens(tmp_path) == made.get_vocab() == {"<unk>": 0, "a": 1, "b": 2, "<end>": 3}


@pytest.mark.parametrize("text", [None, "no JSON", "[]", "{}"])
def test_numbers_that_a_folder_does_not_say_are_unknown(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    assert numbered_tokens(tmp_path) is None


def test_a_teacher_may_know_more_tokens_but_none_by_another_number(folders: dict[str, Path], tmp_path: Path) -> None:
    fields = json.loads((folders["ascii"] / "tokenizer.json").read_text("utf-8"))
    size = len(numbered_tokens(folders["ascii"]) or ())
    more = {**fields["added_tokens"][0], "content": "<think>", "id": size}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**fields, "added_tokens": [*fields["added_tokens"], more]}))
    assert tokenizer_mismatch(folders["ascii"], folders["ascii"]) is None
    assert tokenizer_mismatch(folders["ascii"], tmp_path) is None
    fewer = tokenizer_mismatch(tmp_path, folders["ascii"])
    assert f"1 of {size + 1} differ, such as '<think>', which is number {size}" in str(fewer)
    assert "and is no token in the teacher's" in str(fewer)
    assert "has number" in str(tokenizer_mismatch(folders["ascii"], folders["bytes"]))


def test_tokenizers_without_a_json_file_are_compared_by_transformers(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles_core.run.tokenizers.numbered_tokens", lambda folder: None)
    assert tokenizer_mismatch(folders["ascii"], folders["ascii"]) is None
    assert tokenizer_mismatch(folders["ascii"], folders["bytes"]) is not None
