"""SGLang's own options in a run file, and what is refused before a process is started."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_kit import SharedServer, context_of

from miles_core.errors import MissingExtraError, UserError
from miles_sglang import surface
from miles_sglang.options import EngineOptions
from miles_sglang.server import Server

SERVER_ARGS = '''
class Other:
    nothing: int = 0

class ServerArgs:
    """As SGLang writes its options."""
    model_path: A[str, Arg(help="The model.", aliases=["--model"]), NS("model")]
    mem_fraction_static: A[Optional[float], "Share of the memory.", NS("memory")] = None
    attention_backend: A[Optional[str], Arg(help="Which.", choices=CHOICES)] = None
    chunked_prefill_size: Optional[int] = None
    enable_memory_saver: A[bool, "Whether."] = False
    preferred_sampling_params: A[Optional[str], Arg(help="JSON.", type_parser=json.loads)] = None
    cuda_graph_bs: A[Optional[List[int]], Arg(help="Sizes.", nargs="+")] = None
    port: A[int, "Where."] = 30000

    def __post_init__(self):
        late: int = 0
'''


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An SGLang that only declares options."""
    (tmp_path / "server_args.py").write_text(SERVER_ARGS)
    monkeypatch.setattr(surface, "server_args", lambda: tmp_path / "server_args.py")
    surface.declarations.cache_clear()
    yield
    surface.declarations.cache_clear()


@pytest.mark.usefixtures("declared")
def test_options_are_the_fields_of_server_args_by_their_own_names() -> None:
    assert surface.fields() == {
        "model_path": "str",
        "mem_fraction_static": "Optional[float]",
        "attention_backend": "Optional[str]",
        "chunked_prefill_size": "Optional[int]",
        "enable_memory_saver": "bool",
        "preferred_sampling_params": "Optional[str]",
        "cuda_graph_bs": "Optional[List[int]]",
        "port": "int",
    }
    given = {
        "mem_fraction_static": 1, "chunked_prefill_size": 64, "enable_memory_saver": True, "cuda_graph_bs": [1],
        "preferred_sampling_params": {"top_p": 0.9},
    }  # fmt: skip
    assert EngineOptions(server=given).server == given


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize(
    ("given", "error"),
    [
        (
            {"mem_fraction_statik": 0.8},
            "server has no option 'mem_fraction_statik'.*Did you mean 'mem_fraction_static'",
        ),
        ({"port": 30000}, "server.port cannot be set: every server takes a free port"),
        ({"model_path": "x"}, "server.model_path cannot be set: it is the run's model; set model.path"),
        ({"mem_fraction_static": "0.8"}, "server.mem_fraction_static must be float, got '0.8'"),
        ({"chunked_prefill_size": True}, "server.chunked_prefill_size must be int, got True"),
        ({"enable_memory_saver": 1}, "server.enable_memory_saver must be bool, got 1"),
    ],
)
def test_what_cannot_be_set_is_refused(given: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        EngineOptions(server=given)


def test_without_sglang_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'miles-sglang\[engine\]'"):
        surface.server_args()


def test_another_version_of_sglang_is_refused_with_a_runs_options_and_by_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srt").mkdir()
    (tmp_path / "srt" / "server_args.py").write_text("class OfThatVersion: ...")
    monkeypatch.setattr(surface, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[tmp_path]))
    monkeypatch.setattr(surface, "version", lambda name: "0.5.16")
    surface.declarations.cache_clear()
    refused = r"works with sglang 0\.5\.17, and 0\.5\.16 is installed: pip install"
    with pytest.raises(UserError, match=refused):
        EngineOptions(server={"mem_fraction_static": 0.8})
    with pytest.raises(UserError, match=refused):
        asyncio.run(Server({}, context_of(tmp_path)).start())


@pytest.mark.slow
def test_fields_are_those_of_the_installed_sglang(server: SharedServer) -> None:
    with urllib.request.urlopen(f"{server.url}/server_info") as answer:
        declared = json.load(answer)
    assert {"mem_fraction_static", "tp_size"} <= surface.fields().keys() <= declared.keys()
    assert surface.RESERVED.keys() <= surface.fields().keys()
