"""In the server's scheduler: which version of the weights makes each token, and which cache may be read for it.

SGLang 0.5.17 says only which version a response ended with. Its plugin framework (`sglang.srt.plugins`) lets a function
stand around a method, and its batches carry information by token to the response (`customized_info`): so every forward
pass notes the version that it runs with.

What the cache of prefixes holds was computed with the weights of its time. Each request reads and writes the part of it
that belongs to the weights it began with (`extra_key`), so new weights need no flush, even while old requests go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

STATE = "miles_weight_version"
"""The name under which `/set_internal_state` takes the version of new weights; -1 only asks for an answer."""
IDLE = -2
"""In the place of a version, asks whether nothing is left to do."""
INFO = "weight_versions"
"""The name under which a response has the version of each of its tokens."""

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_version = 0
_publishes = 0
"""How often there were new weights: names the part of the cache, because two weights may have one version."""


def register() -> None:
    """Has SGLang put the functions of this module around its scheduler's, once it loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_SCHEDULER}.set_internal_state", _set_version, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}._add_request_to_queue", _enter_queue, HookType.BEFORE)
    HookRegistry.register(f"{_SCHEDULER}.run_batch", _run_batch, HookType.AROUND)


def _set_version(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    global _version, _publishes
    if STATE not in request.server_args:
        return original(scheduler, request)
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    version = int(request.server_args[STATE])
    if version >= 0:
        _version = version
        _publishes += 1
        for waiting in scheduler.waiting_queue:  # those hold no cache; what runs goes on with its own
            waiting.extra_key = str(_publishes)
    return SetInternalStateReqOutput(updated=version != IDLE or scheduler.is_fully_idle())


def _enter_queue(scheduler: Any, request: Any, *rest: Any, **named: Any) -> None:
    request.extra_key = str(_publishes)


def _run_batch(original: Callable[..., Any], scheduler: Any, batch: Any, *rest: Any, **named: Any) -> Any:
    version, requests = _version, len(batch.reqs)
    result = original(scheduler, batch, *rest, **named)
    output = getattr(result, "logits_output", None)
    if output is not None:
        output.customized_info = {**(output.customized_info or {}), INFO: [version] * requests}
    return result
