"""Prompts: chat templates as transformers applies them, and splits by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.errors import UserError
from miles_core.prompts import Encoder, held_out
from miles_core.roles import Tokenizer
from miles_core.run.tokenizers import load_tokenizer, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("bytes", folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("settings", "question", "text"),
    [
        ({}, "2 + 2", "2 + 2"),
        ({"chat": True}, "2 + 2", "<user>2 + 2</><assistant>"),
        ({"system": "Add."}, "2 + 2", "<system>Add.</><user>2 + 2</><assistant>"),
        ({"template": {"thinking": True}, "chat": True}, "2", "<user>2</><assistant><think>"),
        ({}, [{"role": "user", "content": "hi"}], "<user>hi</><assistant>"),
        ({"system": "A"}, [{"role": "system", "content": "B"}], "<system>B</><assistant>"),
    ],
)
def test_questions_become_prompts(tokenizer: Tokenizer, settings: dict[str, Any], question: Any, text: str) -> None:
    tokens, made = Encoder(tokenizer=tokenizer, **settings).encode(question)
    assert made == text
    assert bytes(tokens.tolist()).decode() == text
    assert tokens.dtype == np.dtype(np.int32)


def test_a_conversation_has_the_tokens_that_transformers_gives_it(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    reference = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert Encoder(tokenizer=tokenizer).encode(messages)[0].tolist() == reference


def test_a_chat_needs_a_chat_template(tmp_path: Path) -> None:
    make_tokenizer("bytes", tmp_path)
    with pytest.raises(UserError, match="has no chat template"):
        Encoder(tokenizer=load_tokenizer(tmp_path), chat=True).encode("hi")


@pytest.mark.parametrize("question", ["", [], [{"content": "hi"}]])
def test_what_is_no_prompt_is_refused(tokenizer: Tokenizer, question: Any) -> None:
    with pytest.raises(ValueError, match=r"the prompt is empty|a conversation is a list of"):
        Encoder(tokenizer=tokenizer).encode(question)


def test_what_the_template_refuses_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="refuses the conversation: roles must alternate"):
        Encoder(tokenizer=tokenizer, chat=True).encode("hi")


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_about_the_fraction_is_held_out(fraction: float) -> None:
    held = sum(held_out(f"question {number}", fraction) for number in range(4000))
    assert abs(held / 4000 - fraction) < 4 * (fraction * (1 - fraction) / 4000) ** 0.5


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_the_same_and_more(content: str, a: float, b: float) -> None:
    assert held_out(content, min(a, b)) <= held_out(content, max(a, b))
