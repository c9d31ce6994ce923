"""Where the members of a weight sync meet: words in a store in the process of trainer rank 0.

Members leave words there for one another ("engine 1 is here") and wait for those of others. The store ends when rank 0
lets it go, and so does every wait in it, at once: so whoever waits for a member that has died hears of it.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from miles_core.errors import RunError
from miles_core.roles import TrainerContext

_KNOCKS = timedelta(seconds=2)
"""How long one who is answered may take to come in, before it is looked again whether anybody answers."""


def place_of(address: str) -> tuple[str, int]:
    """Host and port of an address like tcp://host:port."""
    parts = urlsplit(address)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"{address!r} is not an address like tcp://host:port")
    return parts.hostname, parts.port


def open_meeting(context: TrainerContext) -> tuple[TCPStore, str]:
    """A store at a free port of the address at which the other trainer ranks know this one, which lasts as long as the
    object; and where it is. Rank 0, too, waits in it as a `Meeting` of its own, which does not make it last."""
    host, _ = place_of(context.address)
    listener = socket.create_server((host, 0))
    port: int = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=context.timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, f"tcp://{host}:{port}"


class Meeting:
    """A member's way to the store. store: for process groups; timeout: of each wait. `RunError` if the store does not
    answer, or what is waited for does not come, and when the store ends."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self.host, self.port = place_of(address)
        self.timeout = timedelta(seconds=timeout_s)
        self.store = self._reached(time.monotonic() + timeout_s)
        self.store.set_timeout(self.timeout)

    def _reached(self, until: float) -> TCPStore:
        """The store. It would itself knock at one that has ended until its time is over."""
        while True:
            try:
                with socket.create_connection((self.host, self.port), self.timeout.total_seconds()):
                    pass
                return TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=_KNOCKS)
            except (OSError, dist.DistError) as error:
                if isinstance(error, OSError) or time.monotonic() > until:
                    where = f"tcp://{self.host}:{self.port}"
                    raise RunError(f"weight sync: the trainer does not answer at {where}.") from error

    def say(self, word: str, value: str = "") -> None:
        """Leaves a word."""
        with _lasting():
            self.store.set(word, value)

    def missing(self, words: Sequence[str]) -> list[str]:
        """Waits for words; those that have not been said when the time is over."""
        with _lasting():
            try:
                self.store.wait([*words], self.timeout)
            except dist.DistStoreError:
                return [word for word in words if not self.store.check([word])]
        return []

    def hear(self, word: str) -> str:
        """Waits for a word, and gives its value."""
        if self.missing([word]):
            raise RunError(f"weight sync: nobody said {word!r} within {self.timeout.total_seconds():g} s.")
        with _lasting():
            said: bytes = self.store.get(word)
        return said.decode()

    def forget(self, word: str) -> None:
        """Takes a word away."""
        with _lasting():
            self.store.delete_key(word)


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError as error:
        raise RunError("weight sync: the meeting was given up.") from error
