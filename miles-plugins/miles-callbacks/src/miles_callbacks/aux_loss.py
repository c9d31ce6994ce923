"""The callback `aux-loss-probe`: an auxiliary loss, added to the objective of every optimizer step, and measured.

    z_t = logsumexp(logits_t)                  objective += coefficient * mean_t z_t^2

t runs over the trained tokens of the optimizer step, on all ranks. Chowdhery et al., PaLM, arXiv 2204.02311, section 5.

It shows how anything can be added from inside of a model: a forward hook on the output embedding passes the logits on
unchanged, and the gradient of the auxiliary loss joins them on the way back. So it does not matter how a trainer packs,
shards or checkpoints, as long as it calls the module for the tokens that it trains, and for no others.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from miles_callbacks import options
from miles_core.filler import is_filler
from miles_core.roles import TrainerContext
from miles_core.sample import Batch

if TYPE_CHECKING:
    from torch import Tensor

METRIC = "aux_loss/z"


class AuxLossProbe:
    """On every trainer rank; see the head of this module. Metric: aux_loss/z, the mean of z^2 before coefficient."""

    def __init__(self, settings: options.AuxLossProbe) -> None:
        self.settings = settings
        self._tokens = 0
        self._total: Any = 0.0
        self._handle: Any = None

    def before_train_step(self, context: TrainerContext, model: Any, batch: Batch) -> None:
        """Listens to the logits, which a critic has none of."""
        if context.role == "critic":
            return
        self._tokens, self._total = int(batch["mask"].sum()), 0.0
        module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if module is not None and self._tokens:
            self._handle = module.register_forward_hook(self._listen)

    def after_train_step(self, context: TrainerContext, metrics: dict[str, float]) -> None:
        """Reports, and listens no more. A collective."""
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        total = float(_summed(self._total, context))
        if "skipped_steps" not in metrics:
            metrics[METRIC] = total / self._tokens

    def _listen(self, module: Any, inputs: Any, logits: Tensor) -> Tensor | None:
        import torch

        if not torch.is_grad_enabled() or is_filler():
            return None
        passed: Tensor = _function().apply(logits, self)
        return passed

    def gradient(self, logits: Tensor) -> Tensor:
        """What the auxiliary loss adds to the gradient of the logits [..., V]; counts them. Once a micro-batch."""
        logits = logits.detach().float()
        z = logits.logsumexp(-1)
        self._total = self._total + z.square().sum().double()
        scale = 2 * self.settings.coefficient / self._tokens
        return scale * z.unsqueeze(-1) * logits.softmax(-1)


@cache
def _function() -> Any:
    """The autograd function; made on first use, because this module is imported where there is no torch."""
    import torch

    class AddGradient(torch.autograd.Function):
        """Passes logits on; on the way back, adds the auxiliary loss's gradient."""

        @staticmethod
        def forward(ctx: Any, logits: Tensor, probe: AuxLossProbe) -> Tensor:
            ctx.save_for_backward(logits)  # and not in a closure, which activation checkpointing could not free
            ctx.probe = probe
            return logits.view_as(logits)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
            (logits,) = ctx.saved_tensors
            return gradients[0] + ctx.probe.gradient(logits).to(gradients[0].dtype), None

    return AddGradient


def _summed(total: Any, context: TrainerContext) -> Any:
    """Over ranks."""
    if context.world_size == 1:
        return total
    import torch
    import torch.distributed as dist

    device = "cuda" if context.gpus else "cpu"
    summed = torch.as_tensor(total, dtype=torch.float64, device=device).clone()
    dist.all_reduce(summed)
    return summed
