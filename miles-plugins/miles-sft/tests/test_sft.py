from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from miles_core.errors import UserError
from miles_core.roles import LossInputs, Segments
from miles_core.sample import Prompt, Sampling
from miles_sft.loss import sft
from miles_sft.rollout import Supervised


class Bytes:
    """A tokenizer of UTF-8 bytes that would add a 7 in front if asked for special tokens."""

    eos_token_id: int | None = 256
    pad_token_id = None
    chat_template = None

    def encode(self, text, *, add_special_tokens=True):
        return [7] * add_special_tokens + list(text.encode())


@dataclass
class Context:
    tokenizer: Any = field(default_factory=Bytes)
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 20


def run(answer, seeds=(1, 2), context=None):
    context = Context() if context is None else context
    prompt = Prompt(id=5, tokens=np.array([1, 2, 3], np.int32), text="x", answer=answer, metadata={"level": 2})
    return asyncio.run(Supervised(None).run(prompt, seeds, context))


def test_the_answer_and_the_end_token_are_the_trained_response():
    first, second = run("ab")
    assert (first.group, first.index, second.index) == (5, 0, 1)
    assert first.prompt.tolist() == [1, 2, 3]
    assert first.response.tolist() == [97, 98, 256]
    assert first.mask.all()
    assert not first.logprobs.any()
    assert first.versions.tolist() == [-1, -1, -1]
    assert (first.status, first.reward, first.metadata) == ("completed", None, {"level": 2})


@pytest.mark.parametrize(("room", "response"), [(5, [97, 98]), (3, []), (2, [])])
def test_an_answer_that_does_not_fit_is_cut(room, response):
    (sample,) = run("ab", seeds=(1,), context=Context(max_tokens=room))
    assert sample.response.tolist() == response
    assert sample.status == "truncated"


def test_a_prompt_without_answer_is_refused_by_its_number():
    with pytest.raises(UserError, match="prompt 5 has no answer"):
        run(None)


def test_a_tokenizer_without_end_token_is_refused():
    context = Context()
    context.tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="end-of-sequence"):
        run("ab", context=context)


def test_token_mean_of_the_loss_is_cross_entropy_and_so_is_its_gradient():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 5, 2, 2])
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    inputs = LossInputs(logprobs=logprobs, segments=Segments(ids=torch.tensor([0, 0, 1, 1]), count=2))
    got = sft(inputs, None).losses.mean()
    expected = torch.nn.functional.cross_entropy(logits, tokens)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits))
