"""What lets an unmodified SGLang run where there is no GPU; active in the server's processes only.

Without a GPU, and without AMX, SGLang's layers run their own pure-PyTorch code. Only imports at the head of its modules
stand in the way: of triton, which PyTorch for CPU does not bring; of `sglang-kernel`, whose wheels are for CUDA; and of
torchvision, whose wheels from PyPI do not load beside PyTorch for CPU. `install` answers these imports with stand-ins;
what is really installed comes before a stand-in.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

PACKAGES = ("triton", "sgl_kernel", "torchvision")

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling would need triton
}
"""What a server without a GPU needs to be started with."""


class _Members(type):
    """Lets a class have whatever member it is asked for, as enumerations do."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Unused(metaclass=_Members):
    """What a name in capitals stands for: something that may be inherited from and made."""

    def __init__(self, *arguments: Any, **named: Any) -> None: ...


class _StandIn(types.ModuleType):
    """A module of which every attribute is a stand-in again; as a decorator it changes nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        made: Any = sys.modules.get(full)
        if made is None:
            made = _Members(name, (_Unused,), {"__module__": self.__name__}) if name[0].isupper() else _StandIn(full)
        setattr(self, name, made)
        return made

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if len(arguments) == 1 and callable(arguments[0]) and not named:
            return arguments[0]
        return lambda function: function


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, after all that is installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        fill = _FILLERS.get(module.__name__)
        if fill is not None:
            fill(module)


def _fill_triton(module: Any) -> None:
    module.__version__ = "3.6.0"
    module.cdiv = lambda dividend, divisor: -(dividend // -divisor)
    module.next_power_of_2 = lambda number: 1 << (number - 1).bit_length() if number > 0 else 1


def _fill_language(module: Any) -> None:
    class Constant:
        """`constexpr`, which modules wrap their constants in."""

        def __init__(self, value: Any = None) -> None:
            self.value = value

    module.constexpr = Constant


def _fill_vision(module: Any) -> None:
    module.__version__ = "0.28.0"  # transformers asks


def _fill_kernels(module: Any) -> None:
    import torch

    module.__version__ = "0"
    module.assign_req_to_token_pool_cpu = _assign_tokens
    library: Any = torch.library.Library("sgl_kernel", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("topk_softmax_cpu(Tensor hidden, Tensor gating, int topk, bool renormalize) -> (Tensor, Tensor)")
    library.impl("topk_softmax_cpu", _topk_softmax, "CPU")
    module.library = library  # it undoes its definitions when it goes


def _assign_tokens(rows: Any, table: Any, starts: Any, ends: Any, places: Any, pool: int) -> None:
    """Writes each request's new cache places into its row of the table."""
    done = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = places[done : done + end - start].to(table.dtype)
        done += end - start


def _topk_softmax(hidden: Any, gating: Any, topk: int, renormalize: bool) -> tuple[Any, Any]:
    """The experts of each token and their weights."""
    import torch

    weights, experts = torch.topk(torch.softmax(gating.float(), dim=-1), topk, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts.to(torch.int32)


_FILLERS: dict[str, Callable[[Any], None]] = {
    "triton": _fill_triton,
    "triton.language": _fill_language,
    "torchvision": _fill_vision,
    "sgl_kernel": _fill_kernels,
}


def install() -> None:
    """Answers the imports, in a process that was started with `ENVIRONMENT`; elsewhere nothing happens."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    sys.meta_path.append(_Finder())
