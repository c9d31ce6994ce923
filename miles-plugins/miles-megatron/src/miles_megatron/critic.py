"""The critic of the trainer `megatron`: the policy's model with a head of one output, on ranks of its own or the
policy's.

    V_t = w . h_{t-1}

h_{t-1} is the hidden state that a policy would predict token t from, so V_t is what is expected before t is known. The
body begins as the policy's. Values are float32 in every dtype: the head's product is never rounded. A critic has no
layers that predict further tokens. Everything else (layouts, packing, optimizer, checkpoints) is the trainer's.

Shapes: N tokens of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from miles_core.megatron import MegatronModel
from miles_core.roles import CriticInputs, LossOutputs, Segments
from miles_core.sample import Batch
from miles_megatron import families, model, settings
from miles_megatron.passes import Head, Predicted, Task, ValueHead
from miles_megatron.trainer import MegatronTrainer


class MegatronCritic(MegatronTrainer):
    """One rank. See `miles_core.roles.Critic`."""

    predicts = "value"

    def _describe(self) -> MegatronModel:
        return _headless(families.describe(self._config_json))

    def _configured(self) -> Any:
        options = self.options.transformer
        alone = {name: value for name, value in options.items() if not name.startswith("mtp_")}
        return settings.transformer(replace(self.options, transformer=alone), self._model, self.context.world_size)

    def _build(self) -> list[nn.Module]:
        return model.build(self._config, self._model, self._device, value_seed=self.context.seed)

    def load_pretrained(self, folder: Path) -> None:
        """See `miles_core.roles.Critic.load_pretrained`. Raises `UserError` for another model's weights."""
        self._load_folder(self._chunks, folder)
        if self._optimizer is not None:
            self._optimizer.reload_model_params()

    def values(self, batch: Batch, step: int) -> NDArray[np.float32] | None:
        """Token column [N] on rank 0."""
        return self._column_of(batch)

    def _head(self, batch: Batch, *, training: bool) -> Head | ValueHead:
        return ValueHead()

    def _loss(self, batch: Batch, task: Task, predicted: Predicted, segments: Segments) -> LossOutputs:
        inputs = CriticInputs(
            values=predicted.own,
            returns=self._column(batch, "returns", task),
            old_values=self._column(batch, "values", task),
            segments=segments,
        )
        return self._stage.loss(inputs, self._stage.loss_options)

    def _observed(self, batch: Batch, task: Task, predicted: Predicted, *, first: bool) -> Mapping[str, Tensor]:
        return {}

    def _copy_rest(self, folder: Path) -> None:
        """Nothing: a critic's checkpoint is no model folder."""


def _headless(described: MegatronModel) -> MegatronModel:
    """Without the vocabulary's head, which a folder may hold nevertheless."""
    head = [weight for weight in described.weights if weight.megatron == "output_layer.weight"]
    names = {"lm_head.weight", *(name for weight in head for name in weight.hf)}
    return replace(
        described,
        weights=tuple(weight for weight in described.weights if weight not in head),
        gpt={**described.gpt, "share_embeddings_and_output_weights": False},
        ignored=(*described.ignored, *map(re.escape, sorted(names))),
    )
