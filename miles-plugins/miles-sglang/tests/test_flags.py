"""SGLang's own flags after `--`: all that its parser has, each with what that makes of it, or refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sglang_kit import INSTALLED, REASON, SharedServer

from miles_core.flags import Flag
from miles_sglang import surface
from miles_sglang.flags import flags

pytestmark = pytest.mark.skipif(not INSTALLED, reason=REASON)


@pytest.fixture(scope="module")
def found() -> dict[str, Flag]:
    return flags()


@pytest.mark.slow
def test_each_flag_sets_what_sglang_would_set(server: SharedServer, found: dict[str, Flag]) -> None:
    upstream: dict[str, tuple[str, list[str], Any, str]] = json.loads(server.flags.read_text())
    assert len(upstream) > 450
    assert upstream.keys() <= found.keys()
    for name, (field, words, value, kind) in upstream.items():
        flag = found[name]
        if flag.refusal:
            assert field in surface.RESERVED or kind.startswith("Deprecated") or name == "--config", name
        else:
            assert (flag.places, flag.read(words)) == ((("server", field),), value), name


def test_every_field_that_may_be_set_has_a_flag(found: dict[str, Flag]) -> None:
    places = {place for flag in found.values() for place in flag.places}
    assert places == {("server", name) for name in surface.fields().keys() - surface.RESERVED.keys()}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--port", "30000"], "every server takes a free port"),
        (["--data-parallel-size", "2"], "set engine.count"),
        (["--cuda-graph-max-bs", "8"], "SGLang says --cuda-graph-max-bs-decode instead"),
        (["--config", "x.yaml"], "it sets no field of ServerArgs"),
        (["--mem-fraction-static", "much"], "invalid float value: 'much'"),
        (["--max-total-tokens", "2.5"], "'2.5' is no whole number"),
        (["--trust-remote-code", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_what_cannot_be_set_is_refused(found: dict[str, Flag], words: list[str], reason: str) -> None:
    flag = found[words[0]]
    with pytest.raises(ValueError, match=reason):
        raise ValueError(flag.refusal) if flag.refusal else AssertionError(flag.read(words[1:]))
