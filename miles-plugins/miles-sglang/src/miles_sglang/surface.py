"""SGLang's own options, as its class `ServerArgs` declares them: read from its source, without importing it.

A run file names fields of that class in `[engine.server]`; `miles_sglang.flags` has them as flags. What Miles sets
itself is in `RESERVED`, with the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miles_core.errors import MissingExtraError, UserError, nearest

TESTED = "0.5.17"
"""The version of SGLang that this plugin works with: it stands on parts that other versions may lack."""
INSTALL = "pip install 'miles-sglang[engine]' (without a GPU, see the README of miles-sglang)"

_ONE_MACHINE = "an engine runs on one machine"
_LOOPBACK = "servers listen on loopback only"
RESERVED: Mapping[str, str] = {
    "model_path": "it is the run's model; set model.path",
    "load_format": "weights are published by the trainer",
    "dtype": "set model.dtype",
    "context_length": "set model.max_tokens",
    "random_seed": "set seed",
    "device": "it follows from engine.gpus",
    "host": _LOOPBACK,
    "port": "every server takes a free port",
    "weight_version": "Miles counts the versions of the weights",
    "nnodes": _ONE_MACHINE,
    "node_rank": _ONE_MACHINE,
    "dist_init_addr": _ONE_MACHINE,
    "use_ray": "Miles starts the server",
    "grpc_mode": "Miles speaks HTTP with the server",
    "smg_grpc_mode": "Miles speaks HTTP with the server",
    "tokenizer_worker_num": "pausing needs one tokenizer process",
    "dp_size": "set engine.count",
    "pp_size": "weights reach the ranks of one tensor-parallel group; set engine.gpus",
    "disaggregation_mode": "an engine is one server, which does all",
    "api_key": _LOOPBACK,
    "admin_api_key": _LOOPBACK,
    "ssl_certfile": _LOOPBACK,
    "ssl_keyfile": _LOOPBACK,
    "incremental_streaming_output": "responses are taken whole",
    "stream_interval": "responses are taken whole",
}
"""Fields that Miles sets or does without, each with the reason."""

_SCALARS: Mapping[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}


def server_args() -> Path:
    """The file that declares `ServerArgs`. Raises `MissingExtraError` if SGLang is not installed, `UserError` if it is
    of another version."""
    spec = find_spec("sglang")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder, "srt", "server_args.py")
        if file.is_file():
            if (found := version("sglang")) != TESTED:
                raise UserError(f"engine 'sglang' works with sglang {TESTED}, and {found} is installed: {INSTALL}")
            return file
    raise MissingExtraError(f"engine 'sglang' needs sglang, which is not installed: {INSTALL}")


@dataclass(frozen=True)
class Declared:
    """A field as the source has it. type: as written; arg: what `Arg(…)` says beside it of its flag, as expressions."""

    type: str
    arg: Mapping[str, ast.expr]

    def source(self, name: str) -> str | None:
        """What it says of `name`, as written."""
        return ast.unparse(self.arg[name]) if name in self.arg else None

    def said(self, name: str) -> Any:
        """The value of that, which is a literal; None if it says nothing."""
        return ast.literal_eval(self.arg[name]) if name in self.arg else None


def _body() -> list[ast.stmt]:
    tree = ast.parse(server_args().read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServerArgs")
    return body


@cache
def declarations() -> Mapping[str, Declared]:
    """Every field of `ServerArgs`."""
    return {
        node.target.id: _declared(node.annotation)
        for node in _body()
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _declared(annotation: ast.expr) -> Declared:
    """What `A[type, help or Arg(…), …]` says, which is short for `Annotated`."""
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A"):
        return Declared(ast.unparse(annotation), {})
    parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    args = [part for part in parts if isinstance(part, ast.Call) and ast.unparse(part.func) == "Arg"]
    said = {keyword.arg: keyword.value for arg in args for keyword in arg.keywords if keyword.arg}
    return Declared(ast.unparse(parts[0]), said)


def fields() -> Mapping[str, str]:
    """Name -> type as written, of every field of `ServerArgs`."""
    return {name: declared.type for name, declared in declarations().items()}


def old_flags() -> Mapping[str, str | None]:
    """The flags that SGLang adds by hand, most of them because it has given them up -> what to say instead of them."""
    (method,) = (node for node in _body() if isinstance(node, ast.FunctionDef) and node.name == "add_cli_args")
    calls = [node for node in ast.walk(method) if isinstance(node, ast.Call)]
    added = [call for call in calls if ast.unparse(call.func) == "parser.add_argument"]
    return {ast.literal_eval(call.args[0]): _new_flag(call) for call in added}


def _new_flag(call: ast.Call) -> str | None:
    said = {keyword.arg: keyword.value for keyword in call.keywords}
    return str(ast.literal_eval(said["new_flag"])) if "new_flag" in said else None


def check(given: Mapping[str, Any]) -> None:
    """Refuses fields that SGLang does not have, that Miles sets, and plain values of another type. `UserError`."""
    known = declarations() if given else {}
    for name, value in given.items():
        if name in RESERVED:
            raise UserError(f"server.{name} cannot be set: {RESERVED[name]}")
        if name not in known:
            raise UserError(f"server has no option {name!r}: SGLang's ServerArgs has none. {nearest(name, known)}")
        _check_type(name, value, known[name])


def _check_type(name: str, value: Any, declared: Declared) -> None:
    """Of the types that TOML has too; all others, and what a flag says as JSON, are SGLang's to check."""
    kind = without_none(declared.type)
    wanted = None if "json" in (declared.source("type_parser") or "") else _SCALARS.get(kind)
    if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool")):
        raise UserError(f"server.{name} must be {kind}, got {value!r}")


def without_none(written: str) -> str:
    """X of `Optional[X]`."""
    return written.removeprefix("Optional[").removesuffix("]") if written.startswith("Optional[") else written
