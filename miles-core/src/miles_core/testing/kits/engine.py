"""Rules of an engine: it runs a tiny model with random weights, and transformers says what it must have computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from miles_core.roles import PauseMode
from miles_core.sample import Completion, Request, ScoreRequest, Scores
from miles_core.specs import EngineSpec
from miles_core.testing.fakes import make_request
from miles_core.testing.models import (
    VOCABULARY,
    engine_context,
    gpus_for,
    make_model,
    model_folder,
    response_logprobs,
    weights_of,
)
from miles_core.testing.subject import Subject, skip

TOLERANCE, TOLERANCE_ON_GPU = 2e-5, 1e-3
"""Of a log-probability in float32. Sums in another order are up to 3e-6 apart on a CPU; a GPU may multiply in TF32."""
LONG = 256
"""Tokens of a response that is not finished when something happens to it."""


def gives_the_logprobs_of_the_model(subject: Subject[EngineSpec]) -> Iterator[str]:
    """Log-probabilities of generated tokens are transformers' own, at the temperature, before top-k and top-p."""
    model = make_model()
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.7, 20, 0.9)):
        requests = _requests(max_new_tokens=12, temperature=temperature, top_k=top_k, top_p=top_p)
        for request, completion in _pairs(requests, _generate(subject, requests)):
            expected = response_logprobs(model, request.tokens, completion.tokens, temperature)
            apart = float(np.abs(completion.logprobs - expected.numpy()).max(initial=0))
            if apart > _tolerance(subject):
                yield f"request {request.id}: a log-probability differs by {apart:.3g} at temperature {temperature}"


def takes_the_likeliest_token_when_greedy(subject: Subject[EngineSpec]) -> Iterator[str]:
    """At temperature 0 every token is the likeliest one."""
    import torch

    requests = _requests(max_new_tokens=8, temperature=0.0)
    model = make_model()
    for request, completion in _pairs(requests, _generate(subject, requests)):
        tokens = torch.from_numpy(np.concatenate([request.tokens, completion.tokens]).astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, len(request.tokens) - 1 : -1]
        short = logits.max(-1).values - logits.gather(1, tokens[len(request.tokens) :, None])[:, 0]
        if short.max() > _tolerance(subject):
            yield f"request {request.id}: token {int(short.argmax())} is not the likeliest one"


def gives_each_seed_a_completion(subject: Subject[EngineSpec]) -> Iterator[str]:
    """One completion a seed, of at most as many tokens as asked for, in columns of one length, with the version."""
    requests = [*_requests(max_new_tokens=6, seeds=(1, 2, 3)), *_requests("b", max_new_tokens=1)]
    answers = _generate(subject, requests)
    for request in requests:
        completions = answers.get(request.id, [])
        if len(completions) != request.n:
            yield f"request {request.id} has {len(completions)} completions for {request.n} seeds"
        for completion in completions:
            yield from (f"request {request.id}: {fault}" for fault in _completion_faults(request, completion))


def _completion_faults(request: Request, completion: Completion) -> Iterator[str]:
    lengths = {len(completion.tokens), len(completion.logprobs), len(completion.versions)}
    if len(lengths) != 1 or not 0 < len(completion.tokens) <= request.sampling.max_new_tokens:
        yield f"columns of lengths {sorted(lengths)}, and {request.sampling.max_new_tokens} tokens were asked for"
    if completion.status != "truncated":
        yield f"status {completion.status!r}, although the length limit ended it"
    if set(completion.versions.tolist()) != {0}:
        yield f"versions {sorted(set(completion.versions.tolist()))}, and the weights have version 0"


def gives_the_same_seed_the_same_tokens(subject: Subject[EngineSpec]) -> Iterator[str]:
    """If it has the feature "seeds": the same requests give the same completions, and other seeds others."""
    if "seeds" not in subject.spec.features:
        skip('its record does not have the feature "seeds"')
    requests = _requests(max_new_tokens=12, seeds=(1, 2))

    async def twice(engine: Any) -> list[dict[str, list[Completion]]]:
        return [await _collect(engine, requests) for _ in range(2)]

    first, second = _with_engine(subject, twice)
    for (request, one), (_, other) in zip(_pairs(requests, first), _pairs(requests, second), strict=True):
        if not np.array_equal(one.tokens, other.tokens):
            yield f"request {request.id} gives other tokens when the same seeds come again"
    if all(np.array_equal(*(completion.tokens for completion in first[request.id])) for request in requests):
        yield "different seeds give the same tokens"


def ends_what_is_aborted(subject: Subject[EngineSpec]) -> Iterator[str]:
    """An aborted request comes back as it is, with the status "aborted"; the others are left alone."""
    requests = [make_request("long", 5, max_new_tokens=LONG), make_request("other", 4, max_new_tokens=LONG)]

    async def abort(engine: Any) -> dict[str, list[Completion]]:
        running = asyncio.create_task(_collect(engine, requests))
        await _some_time(engine)
        await engine.abort(["long"])
        return await running

    answers = _with_engine(subject, abort)
    ended, other = answers["long"][0], answers["other"][0]
    if ended.status != "aborted" or len(ended.tokens) >= LONG:
        yield f"the aborted request has {len(ended.tokens)} tokens and the status {ended.status!r}"
    if other.status != "truncated" or len(other.tokens) != LONG:
        yield f"another request has {len(other.tokens)} tokens and the status {other.status!r}"


def pauses_as_its_record_says(subject: Subject[EngineSpec]) -> Iterator[str]:
    """Each pause mode does what `roles.PauseMode` says, and tokens made after new weights have their version."""
    for mode in sorted(subject.spec.pause_modes):
        completion, during = _paused(subject, mode)  # type: ignore[arg-type]
        versions = completion.versions.tolist()
        ends = mode in ("drain", "abort")
        if versions != sorted(versions) or not set(versions) <= {0, 1}:
            yield f"{mode}: versions must rise from 0 to 1, and are {sorted(set(versions))}"
        if ends != during:
            yield f"{mode}: what runs {'must' if ends else 'must not'} be finished when `pause` returns"
        if mode == "abort" and (completion.status != "aborted" or len(completion.tokens) >= LONG):
            yield f"abort: {len(completion.tokens)} tokens and the status {completion.status!r}"
        if mode != "abort" and (completion.status != "truncated" or len(completion.tokens) != LONG):
            yield f"{mode}: {len(completion.tokens)} tokens of {LONG} and the status {completion.status!r}"
        if not ends and set(versions) != {0, 1}:
            yield f"{mode}: tokens of both versions are wanted, and those of {sorted(set(versions))} are there"


def _paused(subject: Subject[EngineSpec], mode: PauseMode) -> tuple[Completion, bool]:
    """What became of a long request, and whether it was finished when `pause` had returned."""
    request = make_request("long", 5, max_new_tokens=LONG)

    async def pause(engine: Any) -> tuple[Completion, bool]:
        running = asyncio.create_task(_collect(engine, [request]))
        await _some_time(engine)
        await engine.pause(mode)
        await asyncio.sleep(0.1)
        during = running.done()
        await asyncio.to_thread(_load, engine, make_model(seed=1))
        engine.set_version(1)
        await engine.resume()
        return (await running)["long"][0], during

    paused: tuple[Completion, bool] = _with_engine(subject, pause)
    return paused


def scores_given_tokens(subject: Subject[EngineSpec]) -> Iterator[str]:
    """If it scores: log-probabilities of given tokens and of the likeliest ones are those of transformers."""
    import torch

    if "scores" not in subject.spec.features:
        skip('its record does not have the feature "scores"')
    rng = np.random.default_rng(0)
    requests = [
        ScoreRequest(tokens=rng.integers(0, VOCABULARY, length).astype(np.int32), first=first, top_k=3, temperature=0.7)
        for length, first in ((2, 1), (17, 6), (40, 1), (9, 9))
    ]

    async def score() -> list[Scores]:
        async with _running(subject, frozen=True) as engine:
            answers: list[Scores] = await engine.score(requests)
            return answers

    model = make_model()
    for number, (request, scores) in enumerate(zip(requests, asyncio.run(score()), strict=True)):
        tokens = torch.from_numpy(request.tokens.astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, request.first - 1 : -1]
        table = (logits / request.temperature).log_softmax(-1)
        picked = table.gather(1, torch.from_numpy(scores.top_tokens.astype(np.int64)))
        expected = {
            "logprobs": (scores.logprobs, table.gather(1, tokens[request.first :, None])[:, 0]),
            "top_logprobs": (scores.top_logprobs, table.topk(3).values),
            "top_logprobs of its top_tokens": (scores.top_logprobs, picked),
        }
        for name, (given, wanted) in expected.items():
            if given.shape != tuple(wanted.shape):
                yield f"request {number}: {name} has the shape {given.shape} and not {tuple(wanted.shape)}"
            elif (apart := float(np.abs(given - wanted.numpy()).max(initial=0))) > _tolerance(subject):
                yield f"request {number}: {name} differs by {apart:.3g}"


def _tolerance(subject: Subject[EngineSpec]) -> float:
    return TOLERANCE_ON_GPU if gpus_for(subject.spec.devices) else TOLERANCE


# ---- Running an engine ----------------------------------------------------------------------------------------------


def _with_engine(subject: Subject[EngineSpec], use: Callable[[Any], Awaitable[Any]]) -> Any:
    """What `use` gives of an engine that is up and has weights."""

    async def run() -> Any:
        async with _running(subject) as engine:
            return await use(engine)

    return asyncio.run(run())


@asynccontextmanager
async def _running(subject: Subject[EngineSpec], *, frozen: bool = False) -> AsyncIterator[Any]:
    gpus, model = gpus_for(subject.spec.devices), model_folder(subject.folder)
    context = engine_context(model, gpus, folder=subject.folder, max_tokens=LONG + 32, frozen=frozen)
    engine = subject.make(context)
    await engine.start()
    try:
        if not frozen:
            await engine.pause(min(subject.spec.pause_modes))
            await asyncio.to_thread(_load, engine, make_model())
            engine.set_version(0)
            await engine.resume()
        yield engine
    finally:
        await engine.stop()


def _load(engine: Any, model: Any) -> None:
    """All weights, in two parts as they come from a weight sync."""
    weights = list(weights_of(model).items())
    for part in (weights[:3], weights[3:]):
        engine.load([name for name, _ in part], [tensor for _, tensor in part])


async def _collect(engine: Any, requests: Sequence[Request]) -> dict[str, list[Completion]]:
    return {name: completions async for name, completions in engine.generate(requests)}


async def _some_time(engine: Any) -> None:
    """Until the engine has generated something, but far from everything."""
    before = engine.busy_seconds
    for _ in range(1000):
        await asyncio.sleep(0.005)
        if engine.busy_seconds > before:
            break
    await asyncio.sleep(0.02)


def _generate(subject: Subject[EngineSpec], requests: Sequence[Request]) -> dict[str, list[Completion]]:
    answers: dict[str, list[Completion]] = _with_engine(subject, lambda engine: _collect(engine, requests))
    return answers


def _requests(name: str = "a", **sampling: Any) -> list[Request]:
    return [make_request(f"{name}{length}", length, **sampling) for length in (1, 9, 4)]


def _pairs(requests: Sequence[Request], answers: dict[str, list[Completion]]) -> Iterator[tuple[Request, Completion]]:
    for request in requests:
        for completion in answers[request.id]:
            yield request, completion


RULES = (
    gives_the_logprobs_of_the_model,
    takes_the_likeliest_token_when_greedy,
    gives_each_seed_a_completion,
    gives_the_same_seed_the_same_tokens,
    ends_what_is_aborted,
    pauses_as_its_record_says,
    scores_given_tokens,
)
