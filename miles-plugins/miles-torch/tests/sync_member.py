"""An engine's side of a weight sync in a process of its own: `python sync_member.py INDEX ENGINES < lines`.

Each line is "connect ADDRESS", "receive", "close" or "die"; each is answered by one line of JSON: the checksum of what
was received (a number per weight), the error, or null.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from miles_core.roles import BucketLayout, EngineContext
from miles_torch import sync

LAYOUT = (
    BucketLayout(names=("a", "b"), shapes=((3, 4), (5,)), dtype="float32"),
    BucketLayout(names=("c",), shapes=((2, 2),), dtype="bfloat16"),
    BucketLayout(names=("d",), shapes=((700, 300),), dtype="float32"),
)


def checksum(tensor: torch.Tensor) -> float:
    """A number that depends on every value and its place."""
    flat = tensor.double().flatten()
    return float((flat * torch.arange(1, len(flat) + 1)).sum())


class Member:
    """The process, seen from the test."""

    def __init__(self, index: int, engines: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(index), str(engines)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "ready"

    def tell(self, line: str) -> None:
        """Sends a line without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The next answer."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """Waits until the process is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def serve(receiver: Any, line: str) -> Any:
    """Does what one line asks."""
    if line == "die":
        os._exit(1)
    if line == "receive":
        found: dict[str, float] = {}
        receiver.receive(lambda names, tensors: found.update(zip(names, map(checksum, tensors), strict=True)))
        return found
    return receiver.close() if line == "close" else receiver.connect()


def main() -> None:
    """See the head of the module."""
    index, engines = int(sys.argv[1]), int(sys.argv[2])
    context = EngineContext(
        model=Path(), index=index, gpus=0, threads=1, dtype="float32", max_tokens=8, seed=0, folder=Path()
    )
    sync.CONNECT_TIMEOUT_S = 8.0
    receiver: Any = None
    print(json.dumps("ready"), flush=True)
    for line in map(str.strip, sys.stdin):
        if line.startswith("connect "):
            receiver = sync.TorchReceiver(context, engines, line.removeprefix("connect "), LAYOUT)
        try:
            answer = serve(receiver, line)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
