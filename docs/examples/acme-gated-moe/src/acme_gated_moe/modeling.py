"""The same model for transformers, as its authors would publish it. To import the module registers it there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeTopKRouter,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from acme_gated_moe.family import MODEL_TYPE


class AcmeGatedMoeConfig(Qwen3MoeConfig):
    """Qwen3's, with the numbers of layers that have no gate."""

    model_type = MODEL_TYPE
    ungated_layers: list[int] | None = None


class GatedAttention(Qwen3MoeAttention):
    """With a gate before the output projection, [B, T, H] -> [B, T, H]."""

    def __init__(self, config: AcmeGatedMoeConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.gate_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **given: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As every attention of transformers is called."""
        query, key, value = (
            linear(hidden_states).unflatten(-1, (-1, self.head_dim))
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **given)
        return self.o_proj(attended.flatten(-2) * self.gate_proj(hidden_states).sigmoid()), weights


class DirectionRouter(Qwen3MoeTopKRouter):
    """Logits are scaled cosines."""

    def __init__(self, config: AcmeGatedMoeConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(self.num_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., H] -> logits [N, E], weights and numbers of the chosen experts [N, k]."""
        tokens = hidden_states.reshape(-1, self.hidden_dim).float()
        products = tokens @ self.weight.float().T
        lengths = tokens.norm(dim=-1, keepdim=True) * self.weight.float().norm(dim=-1)
        logits = self.scale.float() * self.hidden_dim**0.5 * products / lengths
        weights, chosen = logits.softmax(-1).topk(self.top_k)
        return logits, (weights / weights.sum(-1, keepdim=True)).to(hidden_states.dtype), chosen


class AcmeGatedMoeForCausalLM(Qwen3MoeForCausalLM):
    """Qwen3's mixture with these two."""

    config_class = AcmeGatedMoeConfig

    def __init__(self, config: AcmeGatedMoeConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            if number not in (config.ungated_layers or ()):
                layer.self_attn = GatedAttention(config, number)
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate = DirectionRouter(config)
        self.post_init()


AutoConfig.register(MODEL_TYPE, AcmeGatedMoeConfig)
AutoModelForCausalLM.register(AcmeGatedMoeConfig, AcmeGatedMoeForCausalLM)
# transformers holds all experts of a layer as one tensor, and files hold them one by one.
register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("qwen3_moe"))
