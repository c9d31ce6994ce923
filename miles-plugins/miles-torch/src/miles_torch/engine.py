"""The engine `torch`: an asynchronous face on a `Scheduler`, whose thread generates continuously."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from miles_core.errors import UserError
from miles_core.roles import EngineContext, PauseMode, Tokenizer
from miles_core.run.tokenizers import load_tokenizer
from miles_core.sample import Completion, Request, ScoreRequest, Scores
from miles_torch.engine_model import EngineModel
from miles_torch.engine_options import EngineOptions
from miles_torch.generator import Generation, Generator, PromptState
from miles_torch.scheduler import Answer, Job, Scheduler
from miles_torch.scoring import score
from miles_torch.stopping import StopRule, end_tokens

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class TorchEngine:
    """`miles_core.roles.ScoringEngine` for any transformers decoder, on one device.

    version: of the weights, -1 before the first. Requests of one `generate` call enter together, so on an idle engine
    the same requests and weights give the same completions bit for bit, whenever they come. An engine that fails says
    so to everyone who waits and everyone who calls later, as `RunError`.
    """

    def __init__(self, options: EngineOptions, context: EngineContext) -> None:
        if context.gpus > 1:
            raise UserError(
                f"engine.gpus is {context.gpus}, but the engine 'torch' uses one device. Set engine.count for more."
            )
        self.options = options
        self.context = context
        self.version = -1
        self._device = torch.device("cuda" if context.gpus else "cpu")
        self._scheduler = Scheduler(f"engine {context.index}", self._build)
        self._model: EngineModel | None = None
        self._tokenizer: Tokenizer | None = None
        self._ends: frozenset[int] = frozenset()
        self._rules: dict[tuple[frozenset[int], tuple[str, ...]], StopRule] = {}

    def _build(self) -> Generator:
        """Runs on the scheduler's thread, where the number of CPU threads has to be set."""
        torch.set_num_threads(self.context.threads)
        folder = self.context.model
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            self._tokenizer = load_tokenizer(folder)
        self._ends = end_tokens(folder, self._tokenizer)
        self._model = EngineModel(
            folder,
            device=self._device,
            dtype=getattr(torch, self.context.dtype),
            max_tokens=self.context.max_tokens,
        )
        if self.context.frozen:
            self._model.load_pretrained(folder)
        return Generator(self._model, self.options.max_batch)

    @property
    def busy_seconds(self) -> float:
        """Wall-clock time spent computing."""
        return self._scheduler.busy_seconds

    async def start(self) -> None:
        """Builds the model; unless they are frozen, its weights have to be published before anything generates."""
        await asyncio.wrap_future(self._scheduler.start())
        if self.context.frozen:
            self.version = 0
            self._scheduler.set_version(0)
        if self.context.hooks is not None:
            self.context.hooks.engine_started(context=self.context)

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, list[Completion]]]:
        """Requests enter together, at the first step of the iteration; (request id, completions in the order of its
        seeds) as they finish. Who stops iterating aborts the rest. `UserError` for a request that cannot be."""
        return self._stream([(request.id, self._parts(request)) for request in requests])

    async def _stream(
        self, requests: Sequence[tuple[str, list[Generation]]]
    ) -> AsyncIterator[tuple[str, list[Completion]]]:
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[Answer] = asyncio.Queue()

        def deliver(answer: Answer) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody is left to hear it
                loop.call_soon_threadsafe(answers.put_nowait, answer)

        jobs = [Job(name, parts, deliver) for name, parts in requests]
        try:
            await asyncio.wrap_future(self._scheduler.submit(jobs))
            for _ in jobs:
                answer = await answers.get()
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            self._scheduler.drop(jobs)

    def _parts(self, request: Request) -> list[Generation]:
        assert self._model is not None, "generate() comes after start()"
        longest = self.context.max_tokens - 1
        length = len(request.tokens)
        if length > longest:
            raise UserError(
                f"the prompt of request {request.id!r} has {length} tokens, but with model.max_tokens = "
                f"{self.context.max_tokens} at most {longest} fit. Raise model.max_tokens, or drop longer prompts."
            )
        if not request.seeds or not length:
            raise UserError(f"request {request.id!r} has no {'seeds' if length else 'prompt tokens'}")
        if request.tokens.min() < 0 or request.tokens.max() >= self._model.vocabulary:
            raise UserError(
                f"the prompt of request {request.id!r} has tokens outside the model's vocabulary of "
                f"{self._model.vocabulary}. Do tokenizer and model belong together?"
            )
        sampling = request.sampling
        if "" in sampling.stop:
            raise UserError(f"request {request.id!r} has an empty stop string, which would end it at once")
        if sampling.stop and self._tokenizer is None:
            raise UserError(f"stop strings need a tokenizer, and {self.context.model} has none")
        stop = self._stop_rule(sampling.stop_token_ids, sampling.stop)
        limit = min(sampling.max_new_tokens, self.context.max_tokens - length)
        prompt = PromptState(request.tokens)
        return [Generation.of(prompt, sampling, stop, seed, limit) for seed in request.seeds]

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """See `miles_core.roles.ScoringEngine`. `UserError` for a request that cannot be. What generates waits."""
        assert self.version >= 0, "score() comes after weights"
        scores: list[Scores] = []
        longest = self.context.max_tokens
        work = self._scheduler.work(lambda generator: scores.extend(score(generator.model, requests, longest)))
        await asyncio.wrap_future(work)
        return scores

    def _stop_rule(self, token_ids: tuple[int, ...], strings: tuple[str, ...]) -> StopRule:
        """One rule for all requests that stop alike, since a rule remembers what it knows of tokens."""
        rule = StopRule(self._ends | frozenset(token_ids), strings, self._tokenizer)
        return self._rules.setdefault((rule.token_ids, rule.strings), rule)

    async def pause(self, mode: PauseMode) -> None:
        """Returns when nothing generates any more; later requests wait. Aborting ends whole requests of which a part
        runs; requests that have not begun stay in line."""
        await asyncio.wrap_future(self._scheduler.pause(mode))

    async def resume(self) -> None:
        """Goes on, with whatever weights are loaded."""
        await asyncio.wrap_future(self._scheduler.resume())

    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """Ends requests with what they have. Ids that are not in flight are ignored."""
        await asyncio.wrap_future(self._scheduler.abort(ids))

    def load(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Copies Hugging-Face-named tensors into the model. `UserError` for an unknown name or another shape."""
        assert self._model is not None, "load() comes after start()"
        assert not self._scheduler.generating, "load() comes between pause() and resume()"
        self._model.load(names, tensors)

    def set_version(self, version: int) -> None:
        """All tensors of `version` are loaded; `UserError` names those that are missing."""
        assert self._model is not None, "set_version() comes after start()"
        self._model.finish_load()
        self.version = version
        self._scheduler.set_version(version)
        if self.context.hooks is not None:
            self.context.hooks.weights_received(context=self.context, version=version)

    async def sleep(self) -> None:
        """Gives memory back until `wake`; what was generating goes on then, its cache computed again."""
        await asyncio.wrap_future(self._scheduler.sleep())

    async def wake(self, part: Literal["weights", "all"] = "all") -> None:
        """Ends a sleep; with "weights" nothing generates yet."""
        await asyncio.wrap_future(self._scheduler.wake(works=part == "all"))

    async def stop(self) -> None:
        """Aborts what is in flight and ends the thread."""
        await asyncio.to_thread(self._scheduler.stop)
