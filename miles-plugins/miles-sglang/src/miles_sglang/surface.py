"""SGLang's own options, as its class `ServerArgs` declares them: read from its source, without importing it.

A run file names fields of that class in `[engine.server]`. What Miles sets itself is in `RESERVED`, with the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miles_core.errors import MissingExtraError, UserError, nearest

INSTALL = "pip install 'miles-sglang[engine]' (without a GPU, see the README of miles-sglang)"

_ONE_MACHINE = "an engine runs on one machine"
RESERVED: Mapping[str, str] = {
    "model_path": "it is the run's model; set model.path",
    "load_format": "weights are published by the trainer",
    "dtype": "set model.dtype",
    "context_length": "set model.max_tokens",
    "random_seed": "set seed",
    "device": "it follows from engine.gpus",
    "host": "servers listen on loopback only",
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
    "api_key": "servers listen on loopback only",
    "admin_api_key": "servers listen on loopback only",
    "incremental_streaming_output": "responses are taken whole",
    "stream_interval": "responses are taken whole",
}
"""Fields that Miles sets or does without, each with the reason."""

_SCALARS: Mapping[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}


def server_args() -> Path:
    """The file that declares `ServerArgs`. Raises `MissingExtraError` if SGLang is not installed."""
    spec = find_spec("sglang")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder, "srt", "server_args.py")
        if file.is_file():
            return file
    raise MissingExtraError(f"engine 'sglang' needs sglang, which is not installed: {INSTALL}")


@cache
def fields() -> Mapping[str, str]:
    """Name -> type as written, of every field of `ServerArgs`."""
    tree = ast.parse(server_args().read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServerArgs")
    return {
        node.target.id: _type_of(node.annotation)
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _type_of(annotation: ast.expr) -> str:
    """The type in `A[type, help, …]`, which is short for `Annotated`."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A":
        parts = annotation.slice
        annotation = parts.elts[0] if isinstance(parts, ast.Tuple) else parts
    return ast.unparse(annotation)


def check(given: Mapping[str, Any]) -> None:
    """Refuses fields that SGLang does not have, that Miles sets, and plain values of another type. `UserError`."""
    known = fields() if given else {}
    for name, value in given.items():
        if name in RESERVED:
            raise UserError(f"server.{name} cannot be set: {RESERVED[name]}")
        if name not in known:
            raise UserError(f"server has no option {name!r}: SGLang's ServerArgs has none. {nearest(name, known)}")
        _check_type(name, value, known[name])


def _check_type(name: str, value: Any, written: str) -> None:
    """Of the types that TOML has too; all others are SGLang's to check."""
    kind = written.removeprefix("Optional[").removesuffix("]") if written.startswith("Optional[") else written
    wanted = _SCALARS.get(kind)
    if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool")):
        raise UserError(f"server.{name} must be {kind}, got {value!r}")
