"""Modules for a layer of Megatron's model without Transformer Engine, with the same parameter names as with it.

Megatron's own local modules know neither sequence parallelism (the norms) nor packed samples, context parallelism and
latent attention (the attention). These do, in plain PyTorch, so that the whole trainer runs on a CPU.

Shapes: T tokens of this rank, packed; S samples; N heads of queries; G heads of keys and values; D, E their widths.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """An RMS norm that knows sequence parallelism: Megatron sums the gradients of parameters that are so marked."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class NormedColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    """An RMS norm and a linear map, in one module as in Transformer Engine."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = config.layernorm_epsilon

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[T, 1, inputs] -> ([T, 1, outputs of this rank], bias or None)."""
        normed = F.rms_norm(input_, (input_.shape[-1],), self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **kwargs)


class Attention(MegatronModule):  # type: ignore[misc]
    """Causal attention within each packed sample, over context-parallel ranks too: each gathers keys and values."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or (k_channels or config.kv_channels) ** -0.5
        self.group = parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """query [T, N, D], key [T, G, D], value [T, G, E] -> [T, N * E]."""
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        size, rank = self.group.size(), self.group.rank()
        samples, places = _where(lengths, size, rank)
        others = samples, places
        if size > 1:
            key, value = (gather_from_sequence_parallel_region(x.contiguous(), group=self.group) for x in (key, value))
            found = [_where(lengths, size, other) for other in range(size)]
            others = torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])
        seen = (samples[:, None] == others[0]) & (places[:, None] >= others[1])
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=seen.to(query.device),
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.squeeze(0).transpose(0, 1).reshape(len(query), -1)


class LatentAttention(MLASelfAttention):  # type: ignore[misc]
    """Megatron's latent attention, whose own way without Transformer Engine does not sum the gradient of the keys'
    rotary part over tensor-parallel ranks."""

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The narrow queries, and keys with values whole in width, divided along the sequence: what is then gathered
        along it again has its gradient summed."""
        queries, keys_values = super()._qkv_down_projection(hidden_states)
        if keys_values.shape[-1] != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            keys_values = gather_from_tensor_model_parallel_region(keys_values)
            keys_values = scatter_to_sequence_parallel_region(keys_values)
        return queries, keys_values


def _where(lengths: list[int], size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Sample and place in it of each token that a context-parallel rank holds: of 2 * size parts of each sample, the
    rank's part and the same counted from the end."""
    samples, places = [], []
    for number, length in enumerate(lengths):
        part = length // (2 * size)
        own = [torch.arange(length)] if size == 1 else [
            torch.arange(each * part, (each + 1) * part) for each in (rank, 2 * size - 1 - rank)
        ]  # fmt: skip
        places += own
        samples.append(torch.full((sum(map(len, own)),), number))
    return torch.cat(samples), torch.cat(places)


class LocalBackend(LocalSpecProvider):  # type: ignore[misc]
    """Megatron's linear layers with the modules above."""

    def fuse_layernorm_and_linear(self) -> bool:
        """As in Transformer Engine, so that parameters have the same names."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """Norm and linear map in one."""
        return NormedColumnParallelLinear

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False, has_residual: bool = False) -> type:
        """Norm alone."""
        return RMSNorm

    def core_attention(self) -> type:
        """Attention alone."""
        return Attention
