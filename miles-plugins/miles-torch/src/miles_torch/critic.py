"""The critic of the trainer `torch`: the policy's model with a head of one output, on ranks of its own or the policy's.

    V_t = w . h_{t-1}

h_{t-1} is the hidden state that a policy would predict token t from, so V_t is what is expected before t is known. The
body begins as the policy's; w is drawn from a normal distribution of deviation 1 / (D + 1), as in Stiennon et al.,
Learning to summarize from human feedback, arXiv 2009.01325, TRL and OpenRLHF. Values are float32 in every dtype: the
head's product is never rounded.

Everything else (packing, sharding, optimizer, checkpoints) is the trainer's. Shapes: T trained tokens of a micro-batch,
N of a batch; D hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from miles_core.errors import UserError
from miles_core.roles import CriticInputs, LossOutputs, Segments
from miles_core.sample import Batch
from miles_torch import sharding
from miles_torch.metrics import Sums
from miles_torch.model import MicroBatch, Policy, load, weights
from miles_torch.trainer import TorchTrainer

HEAD = "score"
"""Name of the head, as in transformers' token classifiers."""


class ValueNetwork(Policy):
    """A causal language model whose head is replaced, called with a micro-batch. seed: of the new head's weights."""

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__(model)  # while it has its own head, by which it is found out how it has to be run
        setattr(model, HEAD, _head(_without_head(model), seed))

    def forward(
        self, micro: MicroBatch, temperature: float = 1.0, entropy: bool = False, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Values of the trained tokens, float32 [T]. They know no temperature, no entropy and no other tokens."""
        if not hasattr(self.model, HEAD):
            return super().forward(micro, temperature, entropy, targets)
        hidden, _ = self._packed(micro) if self.packed else self._padded(micro)
        head: Tensor = getattr(self.model, HEAD).weight
        return F.linear(hidden.float(), head.float())[:, 0], None


def _without_head(model: Any) -> int:
    """Takes the model's own head away; what was its width?"""
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    parent, _, last = name.rpartition(".")
    delattr(model.get_submodule(parent), last)
    return int(head.weight.shape[1])


def _head(width: int, seed: int) -> nn.Linear:
    # Draws nothing from the generator of the process.
    head: nn.Linear = nn.utils.skip_init(nn.Linear, width, 1, bias=False)  # type: ignore[no-untyped-call]
    nn.init.normal_(head.weight, std=1 / (width + 1), generator=torch.Generator().manual_seed(seed))
    return head


class TorchCritic(TorchTrainer):
    """One rank. See `miles_core.roles.Critic`."""

    predicts = "value"

    def _network(self, model: Any) -> Policy:
        return ValueNetwork(model, self.context.seed)

    def load_pretrained(self, folder: Path) -> None:
        """See `miles_core.roles.Critic.load_pretrained`. Raises `UserError` for another model's weights."""
        given = weights(load(folder, self.context.seed))
        sharding.reshard(self._policy)
        with torch.no_grad():
            for name, own in weights(self._policy.model).items():
                if name.partition(".")[0] == HEAD:
                    continue
                if name not in given or given[name].shape != own.shape:
                    raise UserError(f"{folder} does not fit the critic: {name!r} is missing or of another shape.")
                sharding.local(own).copy_(sharding.local(sharding.like(given[name].detach(), own)))

    def values(self, batch: Batch, step: int) -> NDArray[np.float32] | None:
        """Token column [N] on rank 0."""
        return self._predicted(self._policy, batch)

    def _forward(self, batch: Batch, micro: MicroBatch, sums: Sums, *, first: bool) -> tuple[Tensor, LossOutputs]:
        values, _ = self._policy(micro)
        inputs = CriticInputs(
            values=values,
            returns=self._column(batch, "returns", micro.packed),
            old_values=self._column(batch, "values", micro.packed),
            segments=Segments(ids=micro.segments, count=micro.packed.samples),
        )
        return values, self._stage.loss(inputs, self._stage.loss_options)
