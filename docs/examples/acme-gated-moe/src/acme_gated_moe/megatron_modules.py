"""What stands in Megatron's model instead of its own modules.

Both are made of what the model is made of elsewhere, Transformer Engine's modules or plain ones: `backend`.

Shapes: n tokens of this rank, packed (with sequence parallelism its part of T); H hidden; P width of this rank's heads;
E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from miles_megatron.layers import backend
from miles_megatron.router import Router
from torch import Tensor, nn
from torch.nn import functional as F


def norm(config: Any, **given: Any) -> nn.Module:
    """The norm before attention, apart from the projection that Megatron would put it into: the gate needs it too."""
    module: nn.Module = backend(config).layer_norm(rms_norm=True)(config=config, **given)
    return module


class GatedAttention(SelfAttention):  # type: ignore[misc]
    """Grouped-query attention whose output passes a gate of its input, [n, 1, H] -> [n, 1, H].

    The gate is divided among tensor-parallel ranks as the heads are.
    """

    def __init__(self, config: Any, submodules: Any, *args: Any, **given: Any) -> None:
        linear = backend(config).column_parallel_linear()
        super().__init__(config, replace(submodules, linear_qkv=linear), *args, **given)
        self.linear_gate = linear(
            config.hidden_size,
            self.query_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )

    def forward(self, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        """Megatron's, with what the output projection is given multiplied by the gate."""
        gate: Tensor = self.linear_gate(hidden_states)[0].sigmoid()  # [T, 1, P]

        def gated(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            attended, *others = inputs
            return attended * gate, *others

        handle = self.linear_proj.register_forward_pre_hook(gated)
        try:
            return super().forward(hidden_states, *args, **given)
        finally:
            handle.remove()


class DirectionRouter(Router):
    """A router whose logits are cosines between token and expert, times a learnt scale.

    Megatron then chooses experts and weighs them by a softmax over the logits, as it does for Qwen3.
    """

    def __init__(self, config: Any, **given: Any) -> None:
        super().__init__(config, **given)
        self.scale = nn.Parameter(torch.ones(config.num_moe_experts, dtype=config.params_dtype))
        # With sequence parallelism each rank sees a part of the tokens; Megatron sums gradients that are so marked.
        self.scale.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def gating(self, tokens: Tensor) -> Tensor:
        """[n, 1, H] -> logits [n, 1, E], in float32."""
        experts = F.normalize(self.weight.float(), dim=-1)
        cosines = F.linear(F.normalize(tokens.float(), dim=-1), experts)
        logits: Tensor = cosines * self.scale.float() * tokens.shape[-1] ** 0.5
        return logits
