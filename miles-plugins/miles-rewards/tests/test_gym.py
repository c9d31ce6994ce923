"""reasoning-gym: prompts without end, disjoint splits, and scores equal to the library's own."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_gym.factory import DATASETS

from miles_core.errors import UserError
from miles_core.roles import DataContext
from miles_core.sample import Prompt, Sample
from miles_rewards import options
from miles_rewards.gym import GymData, GymReward
from miles_rewards.gym_look import check


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id: int | None = None
    pad_token_id: int | None = None
    chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode()

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        raise AssertionError("not a chat")


def source(
    task: str = "chain_sum",
    *,
    seed: int = 0,
    split: Literal["train", "eval"] = "train",
    room: int = 2000,
    parameters: Mapping[str, Any] | None = None,
    **rest: Any,
) -> GymData:
    context = DataContext(tokenizer=Bytes(), max_prompt_tokens=room, seed=seed, split=split)
    return GymData(options.GymData(task=task, parameters=parameters or {}, **rest), context)


def take(data: GymData, count: int) -> list[Prompt]:
    return [data.next() for _ in range(count)]


def test_prompts_are_the_questions_of_the_task_in_their_template() -> None:
    data = source(parameters={"max_terms": 3, "min_terms": 3}, prompt="Q: {question}\nA:")
    for position, prompt in enumerate(take(data, 5)):
        entry = prompt.metadata["entry"]
        assert prompt.id == position
        assert prompt.text == f"Q: {entry['question']}\nA:"
        assert bytes(prompt.tokens.tolist()).decode() == prompt.text
        assert prompt.answer == entry["answer"] == str(eval(entry["metadata"]["expression"]))
        assert entry["metadata"]["num_terms"] == 3


SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_a_prompt_may_put_single_values_of_the_metadata() -> None:
    data = source(parameters={"max_terms": 3, "min_terms": 3}, prompt="{expression} =")
    for prompt in take(data, 5):
        entry = prompt.metadata["entry"]
        assert prompt.text == f"{entry['metadata']['expression']} ="
        assert prompt.text[:-2] in entry["question"]


def test_a_prompt_that_says_nothing_of_the_problem_is_refused() -> None:
    with pytest.raises(UserError, match=r"none of the problem's fields: question, .*expression"):
        source(prompt="What is {problem}?")


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (5, 6)])
def test_train_and_eval_never_share_a_question(seeds: tuple[int, int]) -> None:
    """With a few hundred different questions, random ones would meet at once."""
    train = {p.metadata["entry"]["question"] for p in take(source(seed=seeds[0], parameters=SMALL), 600)}
    held = {p.metadata["entry"]["question"] for p in take(source(seed=seeds[1], parameters=SMALL, split="eval"), 200)}
    assert len(train) > 100
    assert len(held) > 10
    assert not train & held


def test_other_seeds_and_other_positions_give_other_problems() -> None:
    first, second = take(source(seed=0), 500), take(source(seed=1), 500)
    assert len({prompt.text for prompt in first + second}) > 990


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1500), st.sampled_from([None, 7]))
def test_any_position_can_be_sought(position: int, size: int | None) -> None:
    walked, sought = source(size=size), source(size=size)
    take(sought, 3)
    walked.seek(position - position % 50)
    expected = take(walked, position % 50 + 2)[-2:]
    sought.seek(position)
    for left, right in zip(expected, take(sought, 2), strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        assert (left.id, left.text, left.metadata) == (right.id, right.text, right.metadata)
    assert [prompt.id for prompt in expected] == [position, position + 1]


def test_size_makes_the_same_prompts_come_again_under_new_ids() -> None:
    data = source(size=5)
    prompts = take(data, 10)
    assert data.size == 5
    assert [prompt.text for prompt in prompts[:5]] == [prompt.text for prompt in prompts[5:]]
    assert [prompt.id for prompt in prompts] == list(range(10))
    assert source().size is None


def test_another_process_makes_the_same_prompts() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(__import__('pathlib').Path(__file__).parent)!r})\n"
        "import json, test_gym\n"
        "print(json.dumps([prompt.text for prompt in test_gym.take(test_gym.source(seed=3), 20)]))"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert json.loads(result.stdout) == [prompt.text for prompt in take(source(seed=3), 20)]


def test_prompts_that_do_not_fit_are_replaced_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    room = 75
    with caplog.at_level(logging.WARNING):
        prompts = take(source(room=room), 40)
    assert all(len(prompt.tokens) <= room for prompt in prompts)
    assert any(len(prompt.tokens) > room for prompt in take(source(), 40))
    assert len(caplog.records) == 1
    assert "there is room for 75" in caplog.text


def test_a_task_that_never_fits_is_refused() -> None:
    with pytest.raises(UserError, match=r"gave no prompt for split 'train' .* of at most 5 tokens"):
        source(room=5)


@pytest.mark.parametrize(
    ("task", "parameters", "error"),
    [
        ("chain_sums", {}, "has no task 'chain_sums'. Did you mean 'chain_sum'"),
        ("chain_sum", {"max_term": 3}, "'chain_sum' has no parameter 'max_term'. Did you mean 'max_terms'"),
        ("chain_sum", {"seed": 3}, "data.parameters.seed is not for you to set"),
        ("chain_sum", {"min_terms": 9}, "'chain_sum' refuses them: max_terms must be >= min_terms"),
        ("composite", {"datasets": [{"name": "chain_sums", "weight": 1, "config": {}}]}, "refuses them: .*chain_sums"),
    ],
)
def test_unknown_tasks_and_parameters_are_refused(task: str, parameters: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        source(task, parameters=parameters)
    if "refuses them" not in error:  # which the library alone knows
        with pytest.raises(UserError, match=error):
            check(options.GymData(task=task, parameters=parameters))


def test_a_light_look_takes_every_task_with_every_parameter() -> None:
    for task, (_, config) in DATASETS.items():
        names = {field.name for field in dataclasses.fields(config)} - {"seed", "size"}
        check(options.GymData(task=task, parameters=dict.fromkeys(names)))


def test_a_plan_refuses_an_unknown_parameter_at_its_place_and_does_not_import_the_library() -> None:
    pytest.importorskip("miles_grpo")
    code = "import sys; from miles_core.cli.main import main; main(); print('reasoning_gym' in sys.modules)"
    command = [sys.executable, "-c", code, "plan", "arithmetic", "data.parameters.max_digit=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert done.stderr == (
        "Error: flag data.parameters.max_digit=2: data.parameters.max_digit: 'chain_sum' has no parameter 'max_digit'. "
        "Did you mean 'max_digits' or 'min_digits'?\n"
    )


def answered(prompt: Prompt, text: str) -> Sample:
    one = np.ones(1, np.int32)
    return Sample(
        group=prompt.id,
        index=0,
        prompt=prompt.tokens,
        response=one,
        mask=one.astype(np.bool_),
        logprobs=one.astype(np.float32),
        versions=one,
        status="completed",
        text=text,
        answer=prompt.answer,
        metadata=prompt.metadata,
    )


TASKS: list[tuple[str, dict[str, Any]]] = [
    ("chain_sum", {}),
    ("basic_arithmetic", {"operators": ["+", "*"], "max_terms": 3}),
    ("decimal_arithmetic", {}),
    ("countdown", {"min_numbers": 3, "max_numbers": 3}),
    ("graph_color", {}),
    ("puzzle24", {}),
    ("polynomial_equations", {}),
    (
        "composite",
        {
            "datasets": [
                {"name": "chain_sum", "weight": 1, "config": {}},
                {"name": "gcd", "weight": 2, "config": {"max_numbers": 3}},
            ]
        },
    ),
]


@pytest.mark.parametrize(("task", "parameters"), TASKS)
def test_scores_are_those_of_reasoning_gym_itself(task: str, parameters: dict[str, Any]) -> None:
    own = dict(parameters)
    if task == "composite":
        own["datasets"] = [reasoning_gym.composite.DatasetSpec(**part) for part in parameters["datasets"]]
    reference = reasoning_gym.create_dataset(task, seed=1, size=10, **own)
    reward = GymReward(options.GymReward())
    prompts = take(source(task, parameters=parameters), 3)
    for prompt in prompts:
        right = prompt.answer or "1"
        for text in (right, f" {right}\n", f"about {right}", "7", "none"):
            expected = reference.score_answer(text.strip(), entry=prompt.metadata["entry"])
            assert reward.score([answered(prompt, text)]) == [expected]
    if prompts[0].answer is not None:
        assert reward.score([answered(prompt, prompt.answer or "") for prompt in prompts]) == [1.0] * 3


def test_the_answer_may_stand_in_a_tag_and_partial_scores_may_not_count() -> None:
    (prompt,) = take(source(), 1)
    texts = [f"so <answer> {prompt.answer} </answer>", f"<answer>{prompt.answer} or 7</answer>", f"{prompt.answer}"]
    samples = [answered(prompt, text) for text in texts]
    full, partial, untagged = GymReward(options.GymReward(answer_tag="answer")).score(samples)
    assert full == 1
    assert 0 < partial < 1
    assert untagged == 0
    assert GymReward(options.GymReward(answer_tag="answer", partial=False)).score(samples) == [1, 0, 0]


def test_the_reward_needs_the_problem() -> None:
    (prompt,) = take(source(entry=False), 1)
    assert set(prompt.metadata) == {"question"}
    with pytest.raises(ValueError, match=r"needs the data source reasoning-gym, with data.entry = true"):
        GymReward(options.GymReward()).score([answered(prompt, "1")])
    with pytest.raises(ValueError, match="needs the data source reasoning-gym"):
        GymReward(options.GymReward()).score([dataclasses.replace(answered(prompt, "1"), metadata={})])
