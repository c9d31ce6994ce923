"""The engine `sglang`: token ids in, token ids out, through a server of SGLang that it owns."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import pickle
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from miles_core.errors import RunError, UserError
from miles_core.extras import import_extra
from miles_core.roles import EngineContext, PauseMode
from miles_core.sample import Completion, Request, Sampling, Status
from miles_sglang import tagging
from miles_sglang.options import EngineOptions
from miles_sglang.server import Server

if TYPE_CHECKING:
    from torch import Tensor

INSIST_S = 0.2
"""How soon an abort is sent again: one that overtakes its request on the way finds nothing to end."""

MEMORY = ["weights", "kv_cache", "cuda_graph"]
"""What the server gives back, in its own words."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_STATUS: Mapping[str, Status] = {"stop": "completed", "length": "truncated", "abort": "aborted"}
_PAUSES: Mapping[str, str] = {"retract": "retract", "in-place": "in_place"}
"""The modes in which the server itself pauses; in the others nothing is left that it could go on with."""


@dataclass(eq=False)
class _Call:
    """A request on its way. ids: what the server knows its parts by; ended: it was aborted; done: it is answered; sent:
    the server may have it."""

    request: Request
    ids: tuple[str, ...]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    sent: bool = False


class SglangEngine:
    """`miles_core.roles.Engine` on a server of SGLang.

    version: of the weights, -1 before the first. What is wrong with a request is a `UserError`; a server that has ended
    a `RunError` with the end of its log.
    """

    def __init__(self, options: EngineOptions, context: EngineContext) -> None:
        self.options, self.context = options, context
        self.version = -1
        self.server = Server(options.server, context)
        self._session: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._vocabulary = _vocabulary(context.model)
        self._open = asyncio.Event()
        self._calls: dict[_Call, None] = {}
        self._counter = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server_paused = self._new_weights = False
        self._asleep: list[str] = []
        self._clock = _Clock()

    # ---- Start and end -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the server; unless they are frozen, its weights have to be published before anything generates."""
        http = import_extra("aiohttp", needed_by="engine 'sglang'", install="miles-sglang[engine]")
        await self.server.start()
        self._loop = asyncio.get_running_loop()
        self._session = http.ClientSession(connector=http.TCPConnector(limit=0), timeout=http.ClientTimeout(total=None))
        if self.context.frozen:
            self.version, self._new_weights = 0, True
            await self.resume()
        if self.context.hooks is not None:
            self.context.hooks.engine_started(context=self.context)

    async def stop(self) -> None:
        """Ends the server; who still waits hears of it."""
        for task in self._tasks:
            task.cancel()
        if self._session is not None:
            await self._session.close()
        await asyncio.to_thread(self.server.stop)

    @property
    def busy_seconds(self) -> float:
        """Wall-clock time with something to generate."""
        return self._clock.seconds

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the server answers. `UserError` with its own words if it refuses."""
        assert self._session is not None, "start first"
        import aiohttp

        try:
            async with self._session.post(f"{self.server.url}/{path}", json=body) as answer:
                text = await answer.text()
                if answer.status == 400:
                    raise UserError(f"SGLang refuses /{path}: {_message(text)}")
                if answer.status != 200:
                    raise RunError(f"{self.server.name}: SGLang answers /{path} with {answer.status}: {text[:2000]}")
        except aiohttp.ClientError as error:
            raise await self._lost(path, error) from error
        return _json(text)

    async def _lost(self, path: str, error: Exception) -> RunError:
        """Why the server does not answer: in most cases it has ended, or is about to."""
        for _ in range(50):
            if self.server.ended is not None:
                return self.server.failure()
            await asyncio.sleep(0.1)
        return RunError(f"{self.server.name}: SGLang does not answer /{path}: {error!r} (log: {self.server.log})")

    # ---- Generating ----------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, list[Completion]]]:
        """Requests enter together, at the first step of the iteration; (request id, completions in the order of its
        seeds) as they finish. Who stops iterating aborts the rest. `UserError` for a request that cannot be."""
        for request in requests:
            self._check(request)
        return self._stream(requests)

    def _check(self, request: Request) -> None:
        longest, length = self.context.max_tokens - 1, len(request.tokens)
        if not request.seeds or not length:
            raise UserError(f"request {request.id!r} has no {'seeds' if length else 'prompt tokens'}")
        if length > longest:
            raise UserError(
                f"the prompt of request {request.id!r} has {length} tokens, but with model.max_tokens = "
                f"{self.context.max_tokens} at most {longest} fit. Raise model.max_tokens, or drop longer prompts."
            )
        if request.tokens.min() < 0 or request.tokens.max() >= self._vocabulary:  # it would end the server
            raise UserError(
                f"the prompt of request {request.id!r} has tokens outside the model's vocabulary of "
                f"{self._vocabulary}. Do tokenizer and model belong together?"
            )
        self._check_stop(request)

    def _check_stop(self, request: Request) -> None:
        stop = request.sampling.stop
        if "" in stop:
            raise UserError(f"request {request.id!r} has an empty stop string, which would end it at once")
        if stop and (self.options.server.get("skip_tokenizer_init") or not _has_tokenizer(self.context.model)):
            raise UserError(f"stop strings need a tokenizer, and SGLang has none of {self.context.model}")

    async def _stream(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, list[Completion]]]:
        calls = [self._call(request) for request in requests]
        tasks = [asyncio.create_task(self._run(call)) for call in calls]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            self._end([call for call in calls if call in self._calls])
            await asyncio.gather(*tasks, return_exceptions=True)

    def _call(self, request: Request) -> _Call:
        # The server aborts every request whose id begins with the given one: none may begin with another.
        call = _Call(request, tuple(f"{next(self._counter)}." for _ in request.seeds))
        self._calls[call] = None
        return call

    async def _run(self, call: _Call) -> tuple[str, list[Completion]]:
        """Waits for the weights, and for the end of a pause; then asks the server."""
        request = call.request
        try:
            await _first(self._open.wait(), call.ended.wait())
            if call.ended.is_set():
                return request.id, [_nothing() for _ in call.ids]
            call.sent = True
            with self._clock:
                answers = await self._post("generate", _question(call, self.context.max_tokens))
            return request.id, [_completion(answer) for answer in answers]
        finally:
            del self._calls[call]
            call.done.set()

    # ---- Aborting and pausing ------------------------------------------------------------------------------------

    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """Ends requests with what they have. Ids that are not in flight are ignored."""
        wanted = None if ids is None else set(ids)
        self._end([call for call in self._calls if wanted is None or call.request.id in wanted])

    def _end(self, calls: Sequence[_Call]) -> None:
        if not calls:
            return
        task = asyncio.create_task(self._insist(calls))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _insist(self, calls: Sequence[_Call]) -> None:
        """Tells the server to end them until they have ended."""
        for call in calls:
            call.ended.set()
        while left := [call for call in calls if call in self._calls]:
            for rid in (rid for call in left if call.sent for rid in call.ids):
                await self._post("abort_request", {"rid": rid})
            await asyncio.sleep(INSIST_S)

    async def pause(self, mode: PauseMode) -> None:
        """Returns when nothing generates any more; later requests wait. Aborting ends all that the server has."""
        self._open.clear()
        if mode in _PAUSES:
            await self._post("pause_generation", {"mode": _PAUSES[mode]})
            self._server_paused = True
            await self._tell(-1)  # answered once the pause is in effect
            self._clock.pause()
            return
        sent = [call for call in self._calls if call.sent]
        if mode == "abort":
            self._end(sent)
        for call in sent:
            await call.done.wait()

    async def resume(self) -> None:
        """Goes on, with the weights that are loaded."""
        if self._new_weights:
            await self._tell(self.version)
            self._new_weights = False
        if self._server_paused:
            await self._post("continue_generation", {"torch_empty_cache": False})
            self._server_paused = False
        self._clock.resume()
        if self.version >= 0:
            self._open.set()

    async def _tell(self, version: int) -> None:
        """Tells the scheduler the version of the weights; -1 if there is nothing new."""
        if not await self._state(version):
            raise RunError(f"{self.server.name}: the scheduler does not know of versions (log: {self.server.log})")

    async def _state(self, said: int) -> bool:
        """What the scheduler answers to a word that `tagging` has for it."""
        return bool(await self._post("set_internal_state", {"server_args": {tagging.STATE: said}}) == [True])

    # ---- Weights and memory --------------------------------------------------------------------------------------

    def load(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Hands Hugging-Face-named tensors to the server. Called between `pause` and `resume`, from a thread."""
        assert self._loop is not None, "load() comes after start()"
        named = [(name, tensor.detach().cpu().clone()) for name, tensor in zip(names, tensors, strict=True)]
        payload = base64.b64encode(pickle.dumps(named)).decode()
        body = {
            "serialized_named_tensors": [payload] * self.server.ranks,
            "flush_cache": False,  # each version has its own part of the cache, see `tagging`
        }
        answer = asyncio.run_coroutine_threadsafe(self._post("update_weights_from_tensor", body), self._loop).result()
        if not answer["success"]:
            raise RunError(f"{self.server.name}: SGLang does not load {', '.join(names)}: {answer['message']}")

    def set_version(self, version: int) -> None:
        """All tensors of `version` are loaded; `resume` goes on with them."""
        self.version, self._new_weights = version, True
        if self.context.hooks is not None:
            self.context.hooks.weights_received(context=self.context, version=version)

    async def sleep(self) -> None:
        """Waits for what generates, then gives GPU memory back, that of the weights too, which are lost."""
        await self.pause("drain")
        await self._idle()
        await self._post("release_memory_occupation", {"tags": MEMORY})
        self._asleep = MEMORY

    async def _idle(self) -> None:
        """What the server has just answered may not be put away yet, and then giving memory back would end it."""
        for _ in range(1000):
            if await self._state(tagging.IDLE):
                return
            await asyncio.sleep(0.01)
        raise RunError(f"{self.server.name}: the server has answered all, but is not idle (log: {self.server.log})")

    async def wake(self, part: Literal["weights", "all"] = "all") -> None:
        """Ends a sleep; with "weights" only so far that they can be loaded."""
        waking = [tag for tag in self._asleep if part in ("all", tag)]
        await self._post("resume_memory_occupation", {"tags": waking})
        self._asleep = [tag for tag in self._asleep if tag not in waking]
        if not self._asleep:
            await self.resume()


class _Clock:
    """Seconds in which something was to be done and no pause held it up: `with clock:` around each thing to do."""

    def __init__(self) -> None:
        self._seconds, self._since = 0.0, 0.0
        self._running, self._paused = 0, False

    @property
    def seconds(self) -> float:
        return self._seconds + (time.perf_counter() - self._since if self._ticks else 0.0)

    @property
    def _ticks(self) -> bool:
        return self._running > 0 and not self._paused

    def _change(self, *, running: int = 0, paused: bool | None = None) -> None:
        self._seconds, self._since = self.seconds, time.perf_counter()
        self._running += running
        self._paused = self._paused if paused is None else paused

    def __enter__(self) -> None:
        self._change(running=1)

    def __exit__(self, *error: object) -> None:
        self._change(running=-1)

    def pause(self) -> None:
        self._change(paused=True)

    def resume(self) -> None:
        self._change(paused=False)


def _vocabulary(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return int((config.get("text_config") or config)["vocab_size"])


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


async def _first(*waits: Any) -> None:
    """Returns when one of them does, and gives the others up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _question(call: _Call, max_tokens: int) -> dict[str, Any]:
    """The body of `/generate`: the parts of a call as one batch."""
    tokens = call.request.tokens.tolist()
    return {
        "rid": list(call.ids),
        "input_ids": [tokens] * len(call.ids),
        "sampling_params": [
            _sampling(call.request.sampling, seed, max_tokens - len(tokens)) for seed in call.request.seeds
        ],
        "return_logprob": True,
    }


def _sampling(sampling: Sampling, seed: int, room: int) -> dict[str, Any]:
    """SGLang's parameters. Its log-probabilities are those of the softmax at the temperature, before top-k and top-p,
    and at temperature 0 those at 1: just what `Sampling` says, so nothing has to be corrected."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": min(sampling.max_new_tokens, room),
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "sampling_seed": seed,
    }


def _completion(answer: Mapping[str, Any]) -> Completion:
    """What the server says of one response."""
    info = answer["meta_info"]
    status = _STATUS[info["finish_reason"]["type"]]
    tokens = answer["output_ids"]
    logprobs = [entry[0] for entry in info.get("output_token_logprobs") or ()]
    versions = info.get(tagging.INFO) or []
    if not len(tokens) == len(logprobs) == len(versions):
        raise RunError(
            f"SGLang answered {len(tokens)} tokens with {len(logprobs)} log-probabilities and {len(versions)} versions"
        )
    return Completion(
        tokens=np.array(tokens, np.int32),
        logprobs=np.array(logprobs, np.float32),
        versions=np.array(versions, np.int32),
        status=status,
    )


def _nothing() -> Completion:
    empty = np.zeros(0, np.int32)
    return Completion(tokens=empty, logprobs=np.zeros(0, np.float32), versions=empty, status="aborted")


def _message(text: str) -> str:
    """What an answer of the server says is wrong."""
    try:
        answer = _json(text)
        return str(answer.get("error", answer).get("message", answer))
    except (ValueError, AttributeError):
        return text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # some of its answers are words
        return text
