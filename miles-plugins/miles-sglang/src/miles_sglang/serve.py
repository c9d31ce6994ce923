"""The server's process: `python -m miles_sglang.serve`, with the fields of `ServerArgs` as a line of JSON on stdin.

Processes that SGLang spawns import this module too, before anything of SGLang, and so get the same stand-ins and hooks.
stdin stays open for as long as the owner lives; when it closes, however the owner ended, everything here ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading

from miles_sglang import cpu, loading, tagging

cpu.install()
loading.register()
tagging.register()


def _end_with_owner() -> None:
    """Waits for the end of stdin, then kills this process's group, which the owner has made for it."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Serves until it is told to end, or its owner is gone."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        fields = json.loads(stdin.readline())
    threading.Thread(target=_end_with_owner, daemon=True).start()

    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        launch_server(ServerArgs(**fields))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
