"""Data sources that core offers: prompts from files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from miles_core.errors import UserError, nearest
from miles_core.prompts import Encoder, held_out
from miles_core.roles import DataContext
from miles_core.run.data_options import JsonlOptions
from miles_core.sample import Prompt

_log = logging.getLogger(__name__)


class Jsonl:
    """Prompts from files of JSON lines, epoch after epoch. `roles.DataSource`.

    Everything is read, checked and tokenised when it is built: bad lines stop a run before it starts. The order within
    an epoch is a function of the run's seed and the epoch; evaluation keeps the order of the files.
    Raises `UserError` with file and line.
    """

    def __init__(self, options: JsonlOptions, context: DataContext) -> None:
        self._prompts = _load(options, context)
        self.size: int | None = len(self._prompts)
        self._seed = context.seed
        self._shuffle = options.shuffle and context.split == "train"
        self._position = 0
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def next(self) -> Prompt:
        """The prompt of the next position."""
        epoch, place = divmod(self._position, len(self._prompts))
        if self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        prompt = replace(self._prompts[self._order[1][place]], id=self._position)
        self._position += 1
        return prompt

    def seek(self, position: int) -> None:
        """`next` gives the prompt of `position`."""
        self._position = position

    def _order_of(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(len(self._prompts))
        order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts)).tolist()
        return order


def check(options: JsonlOptions) -> None:
    """What the record calls before a run starts: there are files, and the first line of each is an object with the keys
    that are asked for. Raises `UserError`."""
    for name, given in (("data.path", options.path), ("data.eval_path", options.eval_path)):
        if given is not None:
            files = _files(name, given)
            try:
                _check_first_lines(files, options)
            except UserError as error:
                raise error.placed(name) from error


def _check_first_lines(files: Sequence[Path], options: JsonlOptions) -> None:
    first = [row for file in files for row in islice(_rows([file]), 1)]
    if not first:
        raise _empty(files)
    for where, row in first:
        _value(row, options.prompt_key, "data.prompt_key", where)
        _answer(row, options, where)
        for key in options.metadata_keys:
            _value(row, key, "data.metadata_keys", where)


def _empty(files: Sequence[Path]) -> UserError:
    return UserError(f"{_listed(files)}: empty; each line must be a JSON object")


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


@dataclass
class _Tally:
    """What became of the lines."""

    read: int = 0
    other_split: int = 0
    too_long: list[int] = field(default_factory=list)


def _load(options: JsonlOptions, context: DataContext) -> list[Prompt]:
    encoder = Encoder(tokenizer=context.tokenizer, chat=options.chat, system=options.system, template=options.template)
    tally, prompts = _Tally(), []
    paths = _paths(options, context)
    for where, row in _rows(paths):
        tally.read += 1
        prompt = _prompt(row, where, options, encoder)
        if options.holdout and held_out(_content(row, options), options.holdout) != (context.split == "eval"):
            tally.other_split += 1
        elif len(prompt.tokens) > context.max_prompt_tokens:
            tally.too_long.append(len(prompt.tokens))
        else:
            prompts.append(prompt)
    _report(tally, prompts, paths, context)
    return prompts


def _paths(options: JsonlOptions, context: DataContext) -> list[Path]:
    """The files of this split, in the order given; those of a pattern by name."""
    if context.split == "train" or options.holdout:
        name, given = "data.path", options.path
    elif options.eval_path is not None:
        name, given = "data.eval_path", options.eval_path
    else:
        raise UserError("evaluation needs prompts of its own: set data.eval_path, or data.holdout to a fraction")
    return _files(name, given)


def _files(name: str, given: str | Sequence[str]) -> list[Path]:
    """The files that the option `name` says, of which there are some."""
    return [path for pattern in ([given] if isinstance(given, str) else given) for path in _matches(name, pattern)]


def _matches(name: str, pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise UserError(f"{name}: {pattern} is a folder; name its files, as in {path / '*.jsonl'}")
    files = sorted(match for match in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if match.is_file())
    if not files:
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, there) if there else f"{path.parent} is no folder, or an empty one."
        raise UserError(f"{name}: there is no file {pattern}. {hint}")
    return files


def _rows(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's "file:line" and object."""
    for path in paths:
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    where = f"{path}:{number}"
                    yield where, _row(line, where)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _row(line: bytes, where: str) -> dict[str, Any]:
    if not line.strip():
        raise UserError(f"{where}: an empty line; each line must be a JSON object")
    try:
        row = json.loads(line.decode("utf-8-sig"))  # Windows begins a file with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise UserError(f"{where}: JSON that cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a JSON object, got {type(row).__name__}")
    return row


def _prompt(row: Mapping[str, Any], where: str, options: JsonlOptions, encoder: Encoder) -> Prompt:
    question = _value(row, options.prompt_key, "data.prompt_key", where)
    if not isinstance(question, str) and not _are_messages(question):
        raise UserError(
            f"{where}: {options.prompt_key!r} must be a text or a list of chat messages, got {type(question).__name__}"
        )
    try:
        tokens, text = encoder.encode(question)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {options.prompt_key!r}: {error}") from error
    return Prompt(
        id=0,
        tokens=tokens,
        text=text,
        answer=_answer(row, options, where),
        metadata={key: _value(row, key, "data.metadata_keys", where) for key in options.metadata_keys},
    )


def _are_messages(question: Any) -> bool:
    return isinstance(question, list) and all(isinstance(message, dict) for message in question)


def _answer(row: Mapping[str, Any], options: JsonlOptions, where: str) -> str | None:
    if not options.answer_key:
        return None
    answer = _value(row, options.answer_key, "data.answer_key", where)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: {options.answer_key!r} must be a text or a number, got {json.dumps(answer)}")
    return str(answer)


def _value(row: Mapping[str, Any], key: str, option: str, where: str) -> Any:
    if key not in row:
        raise UserError(
            f"{where}: there is no key {key!r} ({option}). {nearest(key, row)} "
            f"The line has: {', '.join(row) or 'nothing'}"
        )
    return row[key]


def _content(row: Mapping[str, Any], options: JsonlOptions) -> str:
    return json.dumps(row[options.prompt_key], sort_keys=True, ensure_ascii=False)


def _report(tally: _Tally, prompts: Sequence[Prompt], paths: Sequence[Path], context: DataContext) -> None:
    files = _listed(paths)
    if not tally.read:
        raise _empty(paths)
    if tally.too_long:
        dropped = (
            f"{files}: {len(tally.too_long)} of {tally.read - tally.other_split} prompts are longer than the "
            f"{context.max_prompt_tokens} tokens that fit (the longest has {max(tally.too_long)})"
        )
        if not prompts:
            raise UserError(f"{dropped}, and none is left; raise model.max_tokens or lower sampling.max_new_tokens")
        _log.warning("%s and are left out", dropped)
    if not prompts:
        raise UserError(
            f"{files}: none of the {tally.read} prompts falls into the split {context.split!r}; change data.holdout"
        )
