"""The data source `jsonl`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_core.errors import UserError
from miles_core.roles import DataContext, Tokenizer
from miles_core.run.data import Jsonl, check
from miles_core.run.data_options import JsonlOptions
from miles_core.run.tokenizers import load_tokenizer, make_tokenizer
from miles_core.sample import Prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("bytes", folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    return tokenizer


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "numbers.jsonl", range(23))


def write(path: Path, numbers: Sequence[int]) -> Path:
    rows = [{"prompt": f"{number} + 1 =", "answer": number + 1, "level": number % 3} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(
    tokenizer: Tokenizer,
    path: Path | Sequence[str],
    *,
    split: Literal["train", "eval"] = "train",
    seed: int = 0,
    room: int = 100,
    **rest: Any,
) -> Jsonl:
    options = JsonlOptions(path=str(path) if isinstance(path, Path) else tuple(path), **rest)
    return Jsonl(options, DataContext(tokenizer=tokenizer, max_prompt_tokens=room, seed=seed, split=split))


def take(data: Jsonl, count: int) -> list[Prompt]:
    return [data.next() for _ in range(count)]


def test_a_line_becomes_a_prompt(tokenizer: Tokenizer, numbers: Path) -> None:
    data = source(tokenizer, numbers, shuffle=False, metadata_keys=("level",))
    prompt = take(data, 5)[4]
    assert bytes(prompt.tokens.tolist()) == b"4 + 1 ="
    assert (prompt.id, prompt.text, prompt.answer, prompt.metadata) == (4, "4 + 1 =", "5", {"level": 1})
    assert data.size == 23


def test_messages_go_through_the_chat_template_and_texts_on_demand(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"q": [{"role": "user", "content": "hi"}], "a": 1.5}\n{"q": "hi", "a": "x"}')
    keys: dict[str, Any] = {"prompt_key": "q", "answer_key": "a", "shuffle": False}
    plain = take(source(tokenizer, path, **keys), 2)
    assert [prompt.text for prompt in plain] == ["<user>hi<assistant>", "hi"]
    assert [prompt.answer for prompt in plain] == ["1.5", "x"]
    chats = take(source(tokenizer, path, chat=True, system="S", **keys), 2)
    assert [prompt.text for prompt in chats] == ["<system>S<user>hi<assistant>"] * 2


def test_every_epoch_has_every_prompt_once_in_another_order(tokenizer: Tokenizer, numbers: Path) -> None:
    data = source(tokenizer, numbers)
    epochs = [[prompt.text for prompt in take(data, 23)] for _ in range(3)]
    assert all(Counter(epoch) == Counter(f"{number} + 1 =" for number in range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [prompt.text for prompt in take(source(tokenizer, numbers, seed=1), 23)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_position_can_be_sought(tokenizer: Tokenizer, numbers: Path, shuffle: bool) -> None:
    walked = [(p.id, p.text) for p in take(source(tokenizer, numbers, shuffle=shuffle), 100)]
    data = source(tokenizer, numbers, shuffle=shuffle)

    @settings(max_examples=50)
    @given(st.integers(0, 98))
    def check(position: int) -> None:
        data.seek(position)
        assert [(p.id, p.text) for p in take(data, 2)] == walked[position : position + 2]

    check()


def test_held_out_prompts_are_only_in_evaluation_wherever_they_stand(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", range(200))
    doubled = write(tmp_path / "b.jsonl", [*reversed(range(200)), *range(200)])
    train = source(tokenizer, doubled, holdout=0.2)
    held = source(tokenizer, first, holdout=0.2, split="eval", seed=9)
    assert train.size is not None
    assert held.size is not None
    train_texts = {prompt.text for prompt in take(train, train.size)}
    held_texts = {prompt.text for prompt in take(held, held.size)}
    assert not train_texts & held_texts
    assert len(train_texts | held_texts) == 200
    assert 20 <= len(held_texts) <= 60


def test_evaluation_keeps_the_order_of_its_own_file(tokenizer: Tokenizer, numbers: Path, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [7, 3, 5])
    data = source(tokenizer, numbers, split="eval", eval_path=str(held))
    assert [prompt.text for prompt in take(data, 4)] == ["7 + 1 =", "3 + 1 =", "5 + 1 =", "7 + 1 ="]


def test_files_may_be_listed_or_matched(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, number in (("b", 2), ("a", 1), ("c", 3)):
        write(tmp_path / f"{name}.jsonl", [number])
    matched = source(tokenizer, [f"{tmp_path}/*.jsonl"], shuffle=False)
    assert [prompt.text[0] for prompt in take(matched, 3)] == ["1", "2", "3"]
    listed = source(tokenizer, [f"{tmp_path}/c.jsonl", f"{tmp_path}/[ab].jsonl"], shuffle=False)
    assert [prompt.text[0] for prompt in take(listed, 3)] == ["3", "1", "2"]


def test_prompts_that_do_not_fit_are_left_out_and_told(
    tokenizer: Tokenizer, numbers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data = source(tokenizer, numbers, room=7)
    assert data.size == 10
    assert len(caplog.records) == 1
    assert "13 of 23 prompts are longer than the 7 tokens that fit (the longest has 8)" in caplog.text


def test_a_prompt_that_fits_exactly_is_kept_in_silence(
    tokenizer: Tokenizer, numbers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert source(tokenizer, numbers, room=8).size == 23
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", r"data.jsonl: empty"),
        ('{"prompt": "a", "answer": 1}\n\n', r"data.jsonl:2: an empty line"),
        ('{"prompt": "a", "answer": 1}\n{"prompt": \n', r"data.jsonl:2: not JSON: Expecting value at column"),
        ("[1]\n", r"data.jsonl:1: must be a JSON object, got list"),
        pytest.param("[" * 100_000, r"data.jsonl:1: JSON that cannot be read: maximum recursion", id="too deep"),
        pytest.param('{"answer": ' + "9" * 5000, r"data.jsonl:1: JSON that cannot be read: Exceeds", id="too large"),
        (
            '{"promt": "a", "answer": 1}',
            r"data.jsonl:1: there is no key 'prompt' \(data.prompt_key\). Did you mean 'promt'",
        ),
        ('{"prompt": "a", "solution": 1}', r"no key 'answer' \(data.answer_key\).* The line has: prompt, solution"),
        ('{"prompt": "a", "answer": null}', r"'answer' must be a text or a number, got null"),
        ('{"prompt": "a", "answer": true}', r"'answer' must be a text or a number, got true"),
        ('{"prompt": 5, "answer": 1}', r"'prompt' must be a text or a list of chat messages, got int"),
        ('{"prompt": ["a"], "answer": 1}', r"'prompt' must be a text or a list of chat messages, got list"),
        ('{"prompt": "\\ud800", "answer": 1}', r"data.jsonl:1: 'prompt': the text holds half a surrogate pair"),
        ('{"prompt": "", "answer": 1}', r"data.jsonl:1: 'prompt': the prompt is empty"),
        ('{"prompt": [{"content": "a"}], "answer": 1}', r"data.jsonl:1: 'prompt': a conversation is a list of"),
        ('{"prompt": "a long one", "answer": 1}', r"1 of 1 prompts are longer than the 5 tokens .* none is left"),
    ],
)
def test_bad_lines_are_refused_with_their_place(tokenizer: Tokenizer, tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=error):
        source(tokenizer, path, room=5)


def test_the_mark_that_windows_begins_a_file_with_is_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\n')
    assert source(tokenizer, path).next().text == "a"


def test_text_that_is_not_utf8_is_refused_with_its_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": 1}\n{"prompt": "\xff", "answer": 1}\n')
    with pytest.raises(UserError, match=r"data.jsonl:2: not UTF-8 text \(invalid start byte at byte 12\)"):
        source(tokenizer, path)


def test_a_missing_file_is_refused_with_the_nearest(tokenizer: Tokenizer, numbers: Path) -> None:
    with pytest.raises(UserError, match=r"data.path: there is no file .*number.jsonl. Did you mean 'numbers.jsonl'"):
        source(tokenizer, numbers.with_name("number.jsonl"))
    with pytest.raises(UserError, match="is no folder, or an empty one"):
        source(tokenizer, numbers.parent / "none" / "numbers.jsonl")


LINE = '{"prompt": "a", "answer": 1}\n'


@pytest.mark.parametrize(
    ("files", "options", "error"),
    [
        ({}, {}, r"data.path: there is no file data.jsonl. . is no folder, or an empty one."),
        ({"date.jsonl": LINE}, {}, r"data.path: there is no file data.jsonl. Did you mean 'date.jsonl'"),
        ({"data.jsonl/a": LINE}, {}, r"data.path: data.jsonl is a folder; name its files, as in data.jsonl/\*.jsonl"),
        ({"data.jsonl": ""}, {}, r"data.path: data.jsonl: empty; each line must be a JSON object"),
        ({"data.jsonl": "hello\n" + LINE}, {}, r"data.path: data.jsonl:1: not JSON: Expecting value at column 1"),
        ({"data.jsonl": LINE}, {"prompt_key": "q"}, r"data.path: data.jsonl:1: there is no key 'q' \(data.prompt_key"),
        ({"data.jsonl": LINE}, {"metadata_keys": ("level",)}, r"there is no key 'level' \(data.metadata_keys\)"),
        ({"data.jsonl": LINE}, {"eval_path": "eval.jsonl"}, r"data.eval_path: there is no file eval.jsonl"),
        ({"a": LINE, "b": '{"prompt": "a"}'}, {"path": "?"}, r"data.path: b:1: there is no key 'answer'"),
        ({"data.jsonl": LINE + "hello"}, {}, None),  # a light look is at first lines alone
        ({"a": "", "b": LINE}, {"path": ("a", "b")}, None),
        ({"data.jsonl": '{"prompt": "a"}'}, {"answer_key": ""}, None),
    ],
)
def test_a_light_look_finds_wrong_files_and_wrong_first_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], options: dict[str, Any], error: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    with contextlib.nullcontext() if error is None else pytest.raises(UserError, match=error):
        check(JsonlOptions(**{"path": "data.jsonl", **options}))


def test_evaluation_without_prompts_of_its_own_is_refused(tokenizer: Tokenizer, numbers: Path) -> None:
    with pytest.raises(UserError, match=r"set data.eval_path, or data.holdout"):
        source(tokenizer, numbers, split="eval")


def test_a_split_that_holds_nothing_is_refused(tokenizer: Tokenizer, numbers: Path) -> None:
    with pytest.raises(UserError, match="none of the 23 prompts falls into the split 'eval'"):
        source(tokenizer, numbers, split="eval", holdout=1e-9)


@pytest.mark.parametrize(
    "bad", [{"path": ""}, {"prompt_key": ""}, {"holdout": 1.0}, {"eval_path": "b.jsonl", "holdout": 0.1}]
)
def test_impossible_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        JsonlOptions(**{"path": "a.jsonl", **bad})
