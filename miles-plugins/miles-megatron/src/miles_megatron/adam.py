"""PyTorch's own Adam in Megatron's distributed optimizer, which is what there is without Transformer Engine and Apex.

Megatron trains with it as it is, but its checkpoints were made for Transformer Engine's: they take Adam's count of
steps for a moment, hand all parameters one tensor as their count, and want a count where a rank has no parameter.
`patch` sets that right in this process, and only where Megatron would take PyTorch's Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_done = False


def patch() -> None:
    """Call before an optimizer is made."""
    global _done
    if _done or distrib_optimizer.HAVE_APEX_OR_TE:
        return
    _done = True
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_state
    DistributedOptimizer.load_state_dict = _own_steps(DistributedOptimizer.load_state_dict)
    DistributedOptimizer.state_dict = _with_step(DistributedOptimizer.state_dict)
    DistributedOptimizer.sharded_state_dict = _with_state(DistributedOptimizer.sharded_state_dict)


def _set_state(self: Any, model_param: Any, tensors: dict[str, Tensor]) -> None:
    """PyTorch's Adam keeps its step as a tensor among the moments; it comes another way."""
    group, place = self.model_param_group_index_map[model_param]
    main = self.optimizer.param_groups[group]["params"][place]
    with torch.no_grad():
        for name, own in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step":
                own.copy_(tensors[name])


def _own_steps(load: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Megatron hands all parameters one tensor as their step, which Adam would count up once for each."""

    def load_state_dict(self: Any, state: Any) -> None:
        load(self, state)
        for own in self.optimizer.state.values():
            own["step"] = own["step"].clone()

    return load_state_dict


def _with_step(plain: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A rank may have nothing of an optimizer's: a pipeline stage without experts has none of theirs."""

    def state_dict(self: Any) -> dict[str, Any]:
        if any(group["params"] for group in self.optimizer.param_groups):
            return plain(self)
        groups = self.optimizer.state_dict()["param_groups"]
        for group in groups:
            del group["params"]
            group["step"] = 0.0  # of no parameter
        return {"optimizer": {"param_groups": groups}}

    return state_dict


def _with_state(sharded: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's Adam makes its state in its first step; a checkpoint before it needs one too."""

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        for group in self.optimizer.param_groups if not self.optimizer.state else ():
            for parameter in group["params"]:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return sharded(self, *args, **kwargs)

    return sharded_state_dict
