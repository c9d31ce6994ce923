"""The owner's side of a server's process: its arguments, its start, its log, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miles_core.errors import RunError, UserError
from miles_core.roles import EngineContext
from miles_sglang import cpu, loading, surface

ATTEMPTS = 3
"""How often a start is tried when another program has taken the port meanwhile."""

ENDING_S = 5.0
"""How long a server that does not answer may take to end."""

HINTS: Mapping[str, str] = {
    "CUDA out of memory": "The GPU has too little memory: lower server.mem_fraction_static of the engine, or its "
    "server.max_running_requests or server.cuda_graph_max_bs_decode, or raise engine.gpus. nvidia-smi says who else "
    "has memory there.",
    "--mem-fraction-static": "In the run file --mem-fraction-static is server.mem_fraction_static of the engine. If it "
    "cannot be raised, lower model.max_tokens or raise engine.gpus.",
}
"""What a server says of memory before it ends -> what to do."""

COMMAND = (sys.executable, "-P", "-m", "miles_sglang.serve")
"""-P: what lies in the working folder is not imported."""

_WITHOUT_GPU: Mapping[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",  # the others need a GPU, and end the server at the first request
    "mem_fraction_static": 0.1,
    "max_total_tokens": 65536,
    "max_running_requests": 64,
    "sleep_on_idle": True,
}


def arguments(options: Mapping[str, Any], context: EngineContext) -> dict[str, Any]:
    """Fields of `ServerArgs`, without the port: what Miles sets, and what the run file says."""
    fields: dict[str, Any] = {
        "enable_metrics": True,
        **({"tp_size": context.gpus} if context.gpus else _WITHOUT_GPU),
        "skip_server_warmup": True,  # there are no weights to warm up with
        **({"enable_memory_saver": True} if context.sleeps and context.gpus else {}),
        **options,
    }
    return fields | {
        "model_path": str(context.model),
        "load_format": "auto" if context.frozen else "dummy",
        "dtype": context.dtype,
        "context_length": context.max_tokens + 2,  # SGLang keeps places free behind the longest response
        "random_seed": context.seed + context.index,
        "host": "127.0.0.1",
    }


def _environment(context: EngineContext) -> dict[str, str]:
    """Of the server's process."""
    own = {
        "HF_HUB_OFFLINE": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if context.verify:
        own[loading.VERIFY] = "1"
    if context.sleeps and context.gpus:  # the memory saver is loaded before PyTorch, and needs a library that it brings
        own["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [*_cuda_folders(), os.environ.get("LD_LIBRARY_PATH")]))
    if not context.gpus:
        own |= cpu.ENVIRONMENT | {"OMP_NUM_THREADS": str(context.threads)}
    return {**os.environ, **own}


def _cuda_folders() -> list[str]:
    """Where the CUDA runtime is that came with PyTorch, if it is not the system's."""
    spec = find_spec("nvidia")
    places = (spec.submodule_search_locations or ()) if spec else ()
    return sorted({str(file.parent) for place in places for file in Path(place).glob("*/lib/libcudart.so.*")})


class Server:
    """A server of SGLang in a process group of its own, which ends with this process at the latest.

    options: fields of `ServerArgs` that the run file says. url: where it answers, once it is started. ranks: processes
    that hold a part of the model.
    """

    def __init__(self, options: Mapping[str, Any], context: EngineContext) -> None:
        self.ranks = int(options.get("tp_size", max(context.gpus, 1)))
        self.name, self.log = f"engine {context.index}", context.folder / f"sglang-{context.index}.log"
        self.url = ""
        self._mark = secrets.token_hex(8)  # by which it is told from whoever else may answer at its port
        self._options, self._context = options, context
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Starts the process and waits until it answers. `RunError` with the end of its log if it does not."""
        surface.server_args()  # says what to install if there is none, or another
        if self._context.gpus not in (0, self.ranks):
            raise UserError(
                f"server.tp_size is {self.ranks} and engine.gpus {self._context.gpus}: set engine.gpus alone"
            )
        _check_sleep(arguments(self._options, self._context), self._context)
        for attempt in range(1, ATTEMPTS + 1):
            self._launch(_free_port())
            while self.ended is None:
                if await asyncio.to_thread(self._healthy):
                    _started[self._context.index] = self
                    return
                await asyncio.sleep(0.1)
            if attempt == ATTEMPTS or "address already in use" not in self.tail().lower():
                raise self.failure()

    def _launch(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        fields = arguments(self._options, self._context) | {"port": port, "weight_version": self._mark}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 — our own interpreter
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(self._context),
                start_new_session=True,
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which is found out in a moment
            self._process.stdin.write(json.dumps(fields).encode() + b"\n")
            self._process.stdin.flush()  # and stays open: the process ends when it closes

    def _healthy(self) -> bool:
        try:
            self._get("health")
            return bool(json.loads(self._get("model_info"))["weight_version"] == self._mark)
        except (OSError, HTTPException, ValueError, LookupError, TypeError):  # or another program answers there
            return False

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=5) as answer:  # noqa: S310 — our own server
            body: bytes = answer.read()
            return body

    @property
    def ended(self) -> int | None:
        """The exit code of the process; None while it runs."""
        assert self._process is not None, "start first"
        return self._process.poll()

    def tail(self, lines: int = 25) -> str:
        """The last lines of the server's log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 200 * lines))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])

    def failure(self) -> RunError:
        """That the server has ended, and what it said last. The run hears of it."""
        reason = (
            f"{self.name}: the SGLang server ended with exit code {self.ended} (log: {self.log}). It said last:\n"
            f"{self.tail()}"
        )
        reason = "\n".join([reason, *(hint for word, hint in HINTS.items() if word in reason)])
        self._context.lost(reason)
        return RunError(reason)

    def lost(self, path: str, error: Exception) -> RunError:
        """Why the server does not answer: in most cases it has ended, or is about to. Blocks until it has."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING_S)
                return self.failure()
        return RunError(f"{self.name}: SGLang does not answer /{path}: {error!r} (log: {self.log})")

    def stop(self) -> None:
        """Ends the process and all that it has started; returns when it has ended."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None
        _started.pop(self._context.index, None)


def _check_sleep(fields: Mapping[str, Any], context: EngineContext) -> None:
    """Who shall give GPU memory back is able to. `UserError` if not."""
    if not (context.sleeps and context.gpus):
        return
    mend = "or set placement.sleep = false, with a server.mem_fraction_static that leaves the trainer its memory"
    if not fields["enable_memory_saver"]:
        raise UserError(f"a colocated engine sleeps, but server.enable_memory_saver is false: remove it, {mend}")
    if find_spec("torch_memory_saver") is None:
        raise UserError(f"a colocated engine sleeps by torch_memory_saver: pip install torch_memory_saver, {mend}")


_started: dict[int, Server] = {}
"""Engine -> its server, in the process that has started it."""


def beside(context: EngineContext) -> Server:
    """The server of the engine of this process."""
    return _started[context.index]


def _free_port() -> int:
    """Below those that systems give to whoever asks for any, because the server takes it only after its imports."""
    draw = random.SystemRandom()
    for _ in range(100):
        port = draw.randrange(15000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RunError("no free port on 127.0.0.1 for a server of SGLang")
