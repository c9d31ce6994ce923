"""The engine `sglang`: token ids in, token ids out, through a server of SGLang that it owns."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import pickle
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from miles_core.errors import RunError, UserError
from miles_core.extras import import_extra
from miles_core.roles import EngineContext, Measures, PauseMode
from miles_core.sample import Completion, Request, Sampling, Status
from miles_sglang import tagging
from miles_sglang.meter import Meter
from miles_sglang.options import EngineOptions
from miles_sglang.server import Server

if TYPE_CHECKING:
    from torch import Tensor

WATCH_S = 0.2
"""How often is looked whether the server has ended."""

INSIST_S = 0.2
"""How soon an abort is sent again: one that overtakes its request on the way finds nothing to end."""

SAMPLE_S = 5.0
"""How often a server that generates is asked how it is, which holds up its answers for a moment."""

PATIENCE_S = 3.0
"""How long it may take to say how it is: `miles_core.cluster.engine_pool` waits little longer."""

MEMORY = ["weights", "kv_cache", "cuda_graph"]
"""What the server gives back, in its own words."""

_JSON = {"Content-Type": "application/json"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_STATUS: Mapping[str, Status] = {"stop": "completed", "length": "truncated", "abort": "aborted"}
_PAUSES: Mapping[str, str] = {"retract": "retract", "in-place": "in_place"}
"""The modes in which the server itself pauses; in the others nothing is left that it could go on with."""


@dataclass(eq=False)
class _Call:
    """A request on its way. ids: what the server knows its parts by, one a seed; left: those that have not ended;
    parts: those that are finished; sent: the server may have it; answer: id and completions of the request, or why
    there are none."""

    request: Request
    ids: tuple[str, ...]
    answer: asyncio.Future[tuple[str, list[Completion]]]
    parts: dict[str, Completion] = field(default_factory=dict)
    sent: bool = False
    left: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.left = set(self.ids)

    def finish(self, rid: str, completion: Completion) -> None:
        """Takes a part; the last one completes the answer."""
        self.left.discard(rid)
        self.parts[rid] = completion
        if len(self.parts) == len(self.ids) and not self.answer.done():
            self.answer.set_result((self.request.id, [self.parts[rid] for rid in self.ids]))

    def refuse(self, rid: str, error: Exception) -> None:
        """A part will not be finished, and so there is no answer."""
        self.left.discard(rid)
        if not self.answer.done():
            self.answer.set_exception(error)

    def lose(self, error: Exception) -> None:
        """Nothing more will be heard of those that are left."""
        for rid in list(self.left):
            self.refuse(rid, error)


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
        self._orjson: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._vocabulary = _vocabulary(context.model)
        self._open = asyncio.Event()
        self._calls: dict[_Call, None] = {}
        self._counter, self._name = itertools.count(), secrets.token_hex(4)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server_paused = self._new_weights = False
        self._asleep: list[str] = []
        self._clock = _Clock()
        self._meter = Meter() if options.server.get("enable_metrics", True) else None

    # ---- Start and end -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the server; unless they are frozen, its weights have to be published before anything generates."""
        extra = partial(import_extra, needed_by="engine 'sglang'", install="miles-sglang[engine]")
        http, self._orjson, _ = extra("aiohttp"), extra("orjson"), extra("prometheus_client")
        await self.server.start()
        self._loop = asyncio.get_running_loop()
        self._session = http.ClientSession(connector=http.TCPConnector(limit=0), timeout=http.ClientTimeout(total=None))
        self._spawn(self._watch())
        if self._meter is not None:
            self._spawn(self._sample(self._meter))
        if self.context.frozen:
            self.version, self._new_weights = 0, True
            await self.resume()
        if self.context.hooks is not None:
            self.context.hooks.engine_started(context=self.context)

    async def _watch(self) -> None:
        """The run hears of it when the server ends, also while nobody asks it for anything."""
        while self.server.ended is None:  # noqa: ASYNC110 — a process tells nobody
            await asyncio.sleep(WATCH_S)
        self.server.failure()

    async def _sample(self, meter: Meter) -> None:
        """Looks now and then what a server that generates says of itself."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            if self._clock.ticks and (page := await self._page()):
                meter.sample(page)

    async def _page(self) -> str:
        """What the server says of itself; nothing if it is too busy, or has ended."""
        import aiohttp

        assert self._session is not None, "start first"
        try:
            async with self._session.get(
                f"{self.server.url}/metrics", timeout=aiohttp.ClientTimeout(total=PATIENCE_S)
            ) as answer:
                page: str = await answer.text()
                return page if answer.status == HTTPStatus.OK else ""
        except (aiohttp.ClientError, TimeoutError):
            return ""

    async def measure(self) -> Measures:
        """What the server says of itself since the last call; `miles_sglang.meter` says what that is."""
        if self._meter is None or not (page := await self._page()):
            return {}
        return self._meter.take(page, self.busy_seconds)

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
        async with self._answer(path, body) as answer:
            return _json(await answer.text())

    async def _events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """What the server answers, event by event."""
        async with self._answer(path, body) as answer:
            async for line in _lines(answer.content.iter_any()):
                if line.startswith(b"data: {"):
                    event = self._orjson.loads(line[len(b"data: ") :])
                    if "error" in event:
                        raise UserError(f"SGLang refuses /{path}: {_message(event)}")
                    yield event

    @contextlib.asynccontextmanager
    async def _answer(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        """The server's answer, unless it is an error."""
        assert self._session is not None, "start first"
        import aiohttp

        try:
            url, data = f"{self.server.url}/{path}", self._orjson.dumps(body)
            async with self._session.post(url, data=data, headers=_JSON) as answer:
                if answer.status == 400:
                    raise UserError(f"SGLang refuses /{path}: {_message(_json(await answer.text()))}")
                if answer.status != 200:
                    text = await answer.text()
                    raise RunError(f"{self.server.name}: SGLang answers /{path} with {answer.status}: {text[:2000]}")
                yield answer
        except aiohttp.ClientError as error:
            raise await asyncio.to_thread(self.server.lost, path, error) from error

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
        self._spawn(self._run(calls))
        try:
            for done in asyncio.as_completed([call.answer for call in calls]):
                yield await done
        finally:
            self._end(left := [call for call in calls if not call.answer.done()])
            await asyncio.gather(*(call.answer for call in left), return_exceptions=True)

    def _call(self, request: Request) -> _Call:
        # The server aborts every request whose id begins with the given one, and after an answer all ids that were in
        # it once more: none may begin with another, or come again.
        ids = tuple(f"{self._name}-{next(self._counter)}." for _ in request.seeds)
        call = _Call(request, ids, asyncio.get_running_loop().create_future())
        self._calls[call] = None
        call.answer.add_done_callback(lambda _: self._over(call))
        return call

    def _over(self, call: _Call) -> None:
        del self._calls[call]
        if call.sent:
            self._clock.change(running=-1)

    async def _run(self, calls: Sequence[_Call]) -> None:
        """Waits for the weights, and for the end of a pause; then asks the server for all of them at once: one by one,
        hundreds of them would reach its scheduler in many small batches."""
        error: Exception = RunError(f"{self.server.name}: no answer of SGLang any more (log: {self.server.log})")
        try:
            await self._open.wait()
            if left := [call for call in calls if not call.answer.done()]:
                for call in left:
                    call.sent = True
                self._clock.change(running=len(left))
                await self._ask(left)
        except Exception as raised:
            error = raised
        finally:  # who still waits hears of it
            for call in calls:
                call.lose(error)

    async def _ask(self, calls: Sequence[_Call]) -> None:
        """Each part is answered when it is finished."""
        owners = {rid: call for call in calls for rid in call.ids}
        question = _question(calls, self.context.max_tokens)
        async with contextlib.aclosing(self._events("generate", question)) as answers:
            async for answer in answers:
                info = answer["meta_info"]
                call, ended = owners[info["id"]], info["finish_reason"]
                if ended is None:  # only the first token
                    continue
                if code := ended.get("status_code"):  # it is the server that has aborted it
                    kind = UserError if code == HTTPStatus.BAD_REQUEST else RunError
                    first = not call.answer.done()
                    call.refuse(info["id"], kind(f"{self.server.name}: SGLang refuses a request: {ended['message']}"))
                    if first:  # nobody would read its other parts
                        self._spawn(self._insist([call]))
                else:
                    call.finish(info["id"], _completion(answer))

    # ---- Aborting and pausing ------------------------------------------------------------------------------------

    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """Ends requests with what they have. Ids that are not in flight are ignored."""
        wanted = None if ids is None else set(ids)
        self._end([call for call in self._calls if wanted is None or call.request.id in wanted])

    def _end(self, calls: Sequence[_Call]) -> None:
        """Those that the server does not have yet end at once."""
        for call in calls:
            if not call.sent:
                for rid in call.ids:
                    call.finish(rid, _nothing())
        if sent := [call for call in calls if call.sent]:
            self._spawn(self._insist(sent))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _insist(self, calls: Sequence[_Call]) -> None:
        """Tells the server to end them until they have ended."""
        while left := [rid for call in calls for rid in call.ids if rid in call.left]:
            for rid in left:
                await self._post("abort_request", {"rid": rid})
            await asyncio.sleep(INSIST_S)

    async def pause(self, mode: PauseMode) -> None:
        """Returns when nothing generates any more; later requests wait. Aborting ends all that the server has."""
        self._open.clear()
        if mode in _PAUSES:
            await self._post("pause_generation", {"mode": _PAUSES[mode]})
            self._server_paused = True
            await self._tell(-1)  # answered once the pause is in effect
            self._clock.change(paused=True)
            return
        sent = [call for call in self._calls if call.sent]
        if mode == "abort":
            self._end(sent)
        await asyncio.gather(*(call.answer for call in sent), return_exceptions=True)

    async def resume(self) -> None:
        """Goes on, with the weights that are loaded."""
        if self._new_weights:
            await self._tell(self.version)
            self._new_weights = False
        if self._server_paused:
            await self._post("continue_generation", {"torch_empty_cache": False})
            self._server_paused = False
        self._clock.change(paused=False)
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
        if waking := [tag for tag in MEMORY if tag not in self._asleep]:
            await self._post("release_memory_occupation", {"tags": waking})
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
        if waking := [tag for tag in self._asleep if part in ("all", tag)]:
            await self._post("resume_memory_occupation", {"tags": waking})
        self._asleep = [tag for tag in self._asleep if tag not in waking]
        if not self._asleep:
            await self.resume()


class _Clock:
    """Seconds in which something was to be done and no pause held it up."""

    def __init__(self) -> None:
        self._seconds, self._since = 0.0, 0.0
        self._running, self._paused = 0, False

    @property
    def ticks(self) -> bool:
        return self._running > 0 and not self._paused

    @property
    def seconds(self) -> float:
        return self._seconds + (time.perf_counter() - self._since if self.ticks else 0.0)

    def change(self, *, running: int = 0, paused: bool | None = None) -> None:
        """So many more, or fewer, things are to be done; or a pause begins or ends."""
        self._seconds, self._since = self.seconds, time.perf_counter()
        self._running += running
        self._paused = self._paused if paused is None else paused


def _vocabulary(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return int((config.get("text_config") or config)["vocab_size"])


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of an answer, which may be longer than any buffer."""
    parts: list[bytes] = []
    async for chunk in chunks:
        head, *more = chunk.split(b"\n")
        parts.append(head)
        for start in more:
            yield b"".join(parts)
            parts = [start]


def _question(calls: Sequence[_Call], max_tokens: int) -> dict[str, Any]:
    """The body of `/generate`: the parts of all calls as one batch, each answered when it is finished."""
    parts = [
        (call.request, rid, seed) for call in calls for rid, seed in zip(call.ids, call.request.seeds, strict=True)
    ]
    tokens = {id(call.request): call.request.tokens.tolist() for call in calls}
    return {
        "rid": [rid for _, rid, _ in parts],
        "input_ids": [tokens[id(request)] for request, _, _ in parts],
        "sampling_params": [
            _sampling(request.sampling, seed, max_tokens - len(request.tokens)) for request, _, seed in parts
        ],
        "return_logprob": True,
        "stream": True,
    }


def _sampling(sampling: Sampling, seed: int, room: int) -> dict[str, Any]:
    """SGLang's parameters. Its log-probabilities are those of the softmax at the temperature, before top-k and top-p,
    and at temperature 0 those at 1: just what `Sampling` says, so nothing has to be corrected."""
    longest = min(sampling.max_new_tokens, room)
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": longest,
        "stream_interval": longest + 1,  # nothing between the first token and the end
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


def _message(answer: Any) -> str:
    """What an answer of the server says is wrong."""
    try:
        return str(answer.get("error", answer).get("message", answer))
    except AttributeError:
        return str(answer)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # some of its answers are words
        return text
