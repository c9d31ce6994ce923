"""The rollout `single-turn` and the filters."""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from miles_core.errors import UserError
from miles_core.roles import Tokenizer
from miles_core.run.filter_options import RewardRangeOptions
from miles_core.run.filters import NoAborted, NonzeroStd, RewardRange
from miles_core.run.rollouts import SingleTurn
from miles_core.sample import Completion, Prompt, Sample, Sampling, Status


class Letters:
    """A tokenizer of lower-case letters; token 0 is special."""

    eos_token_id: int | None = 0
    pad_token_id: int | None = 0
    chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(96 + token) if token else "" if skip_special_tokens else "<eos>" for token in token_ids)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        raise AssertionError("not a chat")


@dataclass
class Context:
    """An engine that writes `seed` and the end token."""

    tokenizer: Tokenizer = field(default_factory=Letters)
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=8))
    max_tokens: int = 6
    calls: list[tuple[list[int], tuple[int, ...], Sampling]] = field(default_factory=list)

    async def generate(self, tokens: Any, seeds: Any, sampling: Sampling) -> list[Completion]:
        self.calls.append((list(tokens), tuple(seeds), sampling))
        return [
            Completion(
                tokens=np.array([seed, 0], np.int32),
                logprobs=np.array([-0.5, -float(seed)], np.float32),
                versions=np.array([3, 4], np.int32),
                status="completed",
            )
            for seed in seeds
        ]


PROMPT = Prompt(id=7, tokens=np.array([1, 2, 3], np.int32), text="abc", answer="x", metadata={"level": 2})


def test_single_turn_makes_one_sample_a_seed_in_one_call() -> None:
    context = Context()
    group = asyncio.run(SingleTurn().run(PROMPT, [5, 9], context))
    assert [call[:2] for call in context.calls] == [([1, 2, 3], (5, 9))]
    assert [(sample.group, sample.index, sample.text) for sample in group] == [(7, 0, "e"), (7, 1, "i")]
    for sample, seed in zip(group, [5, 9], strict=True):
        np.testing.assert_array_equal(sample.response, [seed, 0])
        np.testing.assert_array_equal(sample.prompt, PROMPT.tokens)
        np.testing.assert_array_equal(sample.mask, [True, True])
        np.testing.assert_array_equal(sample.logprobs, np.array([-0.5, -seed], np.float32))
        assert (sample.status, sample.reward, sample.answer, sample.metadata) == ("completed", None, "x", {"level": 2})
        assert sample.versions.tolist() == [3, 4]


def test_single_turn_asks_for_no_more_than_fits() -> None:
    context = Context()
    asyncio.run(SingleTurn().run(PROMPT, [1], context))
    assert context.calls[0][2].max_new_tokens == 3


def test_single_turn_refuses_a_prompt_that_fills_the_context() -> None:
    with pytest.raises(UserError, match=r"prompt 7 has 3 tokens .* model.max_tokens = 3"):
        asyncio.run(SingleTurn().run(PROMPT, [1], Context(max_tokens=3)))


def scored(*rewards: float | None) -> list[Sample]:
    empty = np.empty(0, np.int32)
    return [
        Sample(
            group=0,
            index=index,
            prompt=empty,
            response=empty,
            mask=empty.astype(np.bool_),
            logprobs=empty.astype(np.float32),
            versions=empty,
            status="failed" if reward is None else "completed",
            text="",
            reward=reward or 0.0,
        )
        for index, reward in enumerate(rewards)
    ]


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [((1.0, 0.0), True), ((1.0, 1.0), False), ((0.0,), False), ((1.0, None), False), ((None, 1.0, 0.5), True)],
)
def test_nonzero_std_keeps_groups_whose_scored_samples_differ(rewards: tuple[float | None, ...], kept: bool) -> None:
    assert NonzeroStd().keep(scored(*rewards)) is kept


@pytest.mark.parametrize(("statuses", "kept"), [(("completed", "truncated"), True), (("completed", "aborted"), False)])
def test_no_aborted_keeps_groups_that_were_generated_to_the_end(statuses: tuple[Status, ...], kept: bool) -> None:
    group = [replace(sample, status=status) for sample, status in zip(scored(1.0, 1.0), statuses, strict=True)]
    assert NoAborted().keep(group) is kept


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [((0.0, 1.0), True), ((0.2, 0.2), False), ((0.8, 0.8), False), ((None, 0.5), True), ((None, None), False)],
)
def test_reward_range_keeps_groups_between_its_bounds(rewards: tuple[float | None, ...], kept: bool) -> None:
    assert RewardRange(RewardRangeOptions(low=0.2, high=0.8)).keep(scored(*rewards)) is kept


def test_a_reward_range_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="low must be below high"):
        RewardRangeOptions(low=1.0)
