"""reasoning-gym: a data source of problems without end, and the reward that asks each task's own verifier.

A task makes problem i from seed + i, so two datasets with neighbouring seeds are the same problems shifted by one.
Seeds are therefore hashed. Position p of a split has its own run of candidates; the first that belongs to the split (by
the hash of its question) and fits the context is taken. So any position can be computed without those before it, and no
question is ever asked in both splits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import reasoning_gym
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer

from miles_core import Prompt, Sample
from miles_core.errors import UserError
from miles_core.prompts import Encoder, held_out
from miles_core.roles import DataContext
from miles_rewards import options
from miles_rewards.gym_look import check_parameter_names, check_task_name

POSITIONS = 200
"""Prompts that one dataset of a task serves."""
CANDIDATES = 100
"""Problems of a dataset that one prompt may look at. Some tasks make all of a dataset's at once, and refuse many."""
ROUNDS = 10
"""Datasets that one prompt may look at before the task is given up."""

_log = logging.getLogger(__name__)


class GymData:
    """`roles.DataSource` of one task."""

    def __init__(self, settings: options.GymData, context: DataContext) -> None:
        check_task(settings.task, settings.parameters)
        self.size = settings.size
        self._settings = settings
        self._context = context
        self._encoder = Encoder(tokenizer=context.tokenizer, chat=settings.chat, system=settings.system)
        self._position = 0
        self._too_long = 0
        self._dataset = lru_cache(maxsize=4)(self._make_dataset)
        self._prompt = lru_cache(maxsize=4096)(self._make_prompt)  # evaluation asks the same again and again
        self._prompt(0)  # whatever is wrong shows now

    def next(self) -> Prompt:
        """The prompt of the next position."""
        position = self._position
        self._position += 1
        prompt = self._prompt(position if self.size is None else position % self.size)
        return dataclasses.replace(prompt, id=position)

    def seek(self, position: int) -> None:
        """`next` gives the prompt of `position`."""
        self._position = position

    def _make_prompt(self, position: int) -> Prompt:
        settings = self._settings
        for entry in self._candidates(position):
            if held_out(entry["question"], settings.holdout) != (self._context.split == "eval"):
                continue
            tokens, text = self._encoder.encode(_asked(settings.prompt, entry))
            if len(tokens) > self._context.max_prompt_tokens:
                self._warn(len(tokens))
                continue
            answer = entry["answer"]
            return Prompt(
                id=position,
                tokens=tokens,
                text=text,
                answer=None if answer is None else str(answer),
                metadata=self._metadata(entry),
            )
        raise UserError(
            f"data: {ROUNDS * CANDIDATES} problems of reasoning-gym's {settings.task!r} gave no prompt for split "
            f"{self._context.split!r} (holdout = {settings.holdout}) of at most {self._context.max_prompt_tokens} "
            "tokens: the task may have too few different questions, or too long ones: see data.parameters"
        )

    def _candidates(self, position: int) -> Iterator[dict[str, Any]]:
        chunk, place = divmod(position, POSITIONS)
        for attempt in range(ROUNDS):
            dataset = self._dataset(chunk, attempt)
            for candidate in range(place * CANDIDATES, (place + 1) * CANDIDATES):
                yield dataset[candidate]

    def _make_dataset(self, chunk: int, attempt: int) -> Any:
        context = self._context
        name = f"{context.seed}/{context.split}/{chunk}/{attempt}"
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
        return make_dataset(self._settings.task, self._settings.parameters, seed, POSITIONS * CANDIDATES)

    def _metadata(self, entry: dict[str, Any]) -> dict[str, Any]:
        if not self._settings.entry:
            return {"question": entry["question"]}
        return {"task": self._settings.task, "parameters": dict(self._settings.parameters), "entry": entry}

    def _warn(self, length: int) -> None:
        self._too_long += 1
        if self._too_long == 1:
            _log.warning(
                "reasoning-gym: a prompt of %d tokens does not fit and is replaced, as others will be; "
                "there is room for %d",
                length,
                self._context.max_prompt_tokens,
            )


class GymReward:
    """The task's own verifier on the response. Reads the problem that the data source put into the metadata."""

    def __init__(self, settings: options.GymReward) -> None:
        self._settings = settings
        self._datasets: dict[str, Any] = {}

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One score a sample, mostly between 0 and 1. Raises `ValueError` if the data source is another."""
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        if "entry" not in sample.metadata:
            raise ValueError("the reward reasoning-gym needs the data source reasoning-gym, with data.entry = true")
        dataset = self._dataset(sample.metadata["task"], sample.metadata["parameters"])
        tag = self._settings.answer_tag
        answer = sample.text.strip() if tag is None else extract_answer(sample.text, tag_name=tag)
        score = float(dataset.score_answer(answer, sample.metadata["entry"]))
        return score if self._settings.partial or score >= 1 else 0.0

    def _dataset(self, task: str, parameters: Mapping[str, Any]) -> Any:
        key = json.dumps([task, parameters], sort_keys=True, default=str)
        if key not in self._datasets:
            self._datasets[key] = make_dataset(task, parameters, seed=0, size=1)
        return self._datasets[key]


def _asked(template: str, entry: Mapping[str, Any]) -> str:
    """The template with its {fields} filled from a problem: its question, and what its metadata have in single values.

    Raises `UserError` for a template that says nothing of the problem.
    """
    single = {name: value for name, value in entry["metadata"].items() if isinstance(value, (str, int, float))}
    fields = {"question": entry["question"], **single}
    used = [name for name in fields if f"{{{name}}}" in template]
    if not used:
        raise UserError(f"data.prompt = {template!r} has none of the problem's fields: {', '.join(map(str, fields))}")
    for name in used:
        template = template.replace(f"{{{name}}}", str(fields[name]))
    return template


def check_task(task: str, parameters: Mapping[str, Any]) -> None:
    """Raises `UserError` for a task or parameter that does not exist, with the nearest, and for a value it refuses."""
    check_task_name(task, DATASETS)
    check_parameter_names(task, parameters, {field.name for field in dataclasses.fields(DATASETS[task][1])})
    try:
        make_dataset(task, parameters, seed=0, size=1)
    except Exception as error:  # tasks check by assertions, and not all of them check
        raise UserError(f"data.parameters: {task!r} refuses them: {error or type(error).__name__}") from error


def make_dataset(task: str, parameters: Mapping[str, Any], seed: int, size: int) -> Any:
    """The task's dataset. A composite's parts come as tables."""
    values = dict(parameters)
    if task == "composite":
        values["datasets"] = [DatasetSpec(**part) for part in values.get("datasets", ())]
    return reasoning_gym.create_dataset(task, **values, seed=seed, size=size)
