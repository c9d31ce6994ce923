"""The router of experts: Megatron's, with auxiliary losses that do not depend on micro-batches, ranks or padding.

With N tokens and S samples in the mini-batch, all ranks together, E experts of which each token chooses k:

balance (`seq_aux_loss`, arXiv 2412.19437, section 2.1.2), of each sample s with T_s tokens by itself:
    coefficient / S * sum_s E sum_i f_si P_si,  f_si = (choices of expert i) / (k T_s),  P_si = mean score of expert i
z-loss (arXiv 2202.08906):
    coefficient / N * sum_t logsumexp(logits_t)^2

Their gradients join those of the objective, which is a sum too. Counts of choices, by which Megatron moves the bias
that chooses experts, leave out padding and fillers as well. Left out: losses that balance a micro-batch or the
micro-batches so far, which depend on what these are.

A router is not told whose tokens it sees, and with recomputation it is called again in the backward pass. So `Passes`
says so before each pass: `counting`.

Shapes: N tokens of a rank's row, n of them on this tensor-parallel rank; S samples of a micro-batch; E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router as AnyRouter
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from miles_core.errors import UserError


@dataclass(frozen=True)
class Counted:
    """What counts of a micro-batch on this rank.

    samples: int64 [N], which of the micro-batch's samples each token is of. left: int64 [N], how many tokens of its
    sample follow, itself included; 0 for what does not count. count: S. tokens_total, samples_total: of the mini-batch.
    """

    samples: Tensor
    left: Tensor
    count: int
    tokens_total: int
    samples_total: int


_current: list[Counted] = []
"""Of the pass that runs; none where nothing is counted. Not a context variable: the backward pass has other threads."""
_totals: dict[str, Tensor] = {}
"""Name of a loss -> what this rank's tokens and layers contributed since `metrics`."""


def counting(counted: Counted | None) -> None:
    """Says what counts in the pass that follows."""
    _current[:] = [] if counted is None else [counted]


class Router(TopKRouter):  # type: ignore[misc]
    """See the head of the module."""

    def apply_z_loss(self, logits: Tensor, padding_mask: Any = None) -> Tensor:
        """Logits [n, E], to which the loss is attached."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        counted, _, counts = self._counted(len(logits))
        loss = (logits.logsumexp(-1).square() * counts).sum() / counted.tokens_total
        return self._attached("moe/z_loss", logits, loss, coefficient)

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, seq_length: int, bsz: int, **_: Any
    ) -> Tensor:
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if coefficient == 0:
            return probs
        counted, samples, counts = self._counted(len(scores))
        sums = scores.new_zeros(counted.count, scores.shape[1])
        chosen = sums.index_add(0, samples, (routing_map * counts[:, None]).to(sums.dtype))
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(chosen, group=self.tp_cp_group)
        total = chosen.sum(1, keepdim=True).clamp(min=1.0)  # k T
        mean = sums.index_add(0, samples, scores * counts[:, None]) * self.topk / total
        loss = scores.shape[1] * (chosen / total * mean).sum() / counted.samples_total
        return self._attached("moe/seq_aux_loss", probs, loss, coefficient)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Any = None) -> None:
        if self.enable_expert_bias and torch.is_grad_enabled() and _current:
            _, _, counts = self._counted(len(routing_map))
            with torch.no_grad():
                self.local_tokens_per_expert += (routing_map & counts[:, None]).sum(0)

    def _counted(self, tokens: int) -> tuple[Counted, Tensor, Tensor]:
        """What counts, and of this tensor-parallel rank's tokens the samples, and whether each token counts, bool [n].

        A layer that predicts further tokens has no input at the last places of a sample.
        """
        (counted,) = _current
        rank = self.tp_group.rank() if tokens < len(counted.samples) else 0
        own = slice(rank * tokens, (rank + 1) * tokens)
        without = self.config.mtp_num_layers if self.is_mtp_layer else 0
        return counted, counted.samples[own], counted.left[own] > without

    def _attached(self, name: str, activation: Tensor, loss: Tensor, coefficient: float) -> Tensor:
        _totals[name] = _totals.get(name, torch.zeros_like(loss)) + loss.detach()
        attached: Tensor = MoEAuxLossAutoScaler.apply(activation, loss * coefficient)
        return attached


def losses(config: Any) -> list[str]:
    """Names of the auxiliary losses that a configuration asks for."""
    if config.num_moe_experts is None:
        return []
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    pairs = [(kinds, coefficients)] if isinstance(kinds, str) else zip(kinds, coefficients, strict=True)
    balances = any(kind == "seq_aux_loss" and coefficient for kind, coefficient in pairs)
    return ["moe/seq_aux_loss"] * balances + ["moe/z_loss"] * (config.moe_z_loss_coeff is not None)


def counts(config: Any) -> bool:
    """Whether a configuration needs `counting`."""
    moves = config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate != 0
    return bool(losses(config)) or (config.num_moe_experts is not None and moves)


def metrics(config: Any, device: torch.device) -> dict[str, float]:
    """The auxiliary losses since the last call, without coefficients, means over layers. A collective of all ranks."""
    names = losses(config)
    if not names:
        return {}
    found = torch.stack([_totals.pop(name, torch.zeros(())).to(device, torch.float64) for name in names])
    dist.all_reduce(found)
    layers = sum(config.moe_layer_freq) + (config.mtp_num_layers or 0)
    return {name: value / layers for name, value in zip(names, found.tolist(), strict=True)}


def check(chunks: Sequence[nn.Module], config: Any) -> None:
    """Refuses a family's own router whose losses would depend on micro-batches. Raises `UserError`."""
    for chunk in chunks if counts(config) else ():
        for module in chunk.modules():
            if isinstance(module, AnyRouter) and not isinstance(module, Router):
                raise UserError(
                    f"the family's router {type(module).__module__}:{type(module).__name__} does not derive from "
                    "miles_megatron.router:Router, so its losses and counts would depend on micro-batches; turn "
                    "moe_z_loss_coeff, moe_aux_loss_coeff and moe_router_bias_update_rate off"
                )
