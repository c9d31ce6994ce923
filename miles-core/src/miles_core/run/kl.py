"""An adaptive weight of the KL divergence to the reference: `[kl]` of a run file.

With K the divergence measured on a batch of n samples, and the weight beta that the batch was trained with:

    beta <- beta (1 + clip(K / target - 1, -0.2, 0.2) n / horizon)

Ziegler et al., Fine-tuning language models from human preferences, arXiv 1909.08593, section 2.2; the same in TRL
(until 0.11), verl and OpenRLHF. K is the k1 estimate, log pi - log ref, of the policy that wrote the samples or, if its
log-probabilities were recomputed, of the policy before the batch's first update. It is a mean over samples: of their
sums over tokens (per = "sequence": Ziegler et al., TRL) or of their means over tokens (per = "token": verl, OpenRLHF).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from miles_core.config.schema import Component, KLSection, Stage
from miles_core.config.traits import kl_weights
from miles_core.sample import Batch
from miles_core.specs import AdvantageSpec

BOUND = 0.2
"""Of the relative error that one batch counts with."""


class KLControl:
    """The weight of a stage's divergence, which the collector keeps and checkpoints. coefficient: the weight now."""

    def __init__(self, stage: Stage) -> None:
        ((self._where, self._option),) = kl_weights(stage)
        component = stage.advantage if self._where == "advantage" else stage.loss
        assert component is not None
        self._section = stage.kl
        self.coefficient = float(getattr(component.options, self._option))

    @classmethod
    def of(cls, stage: Stage) -> KLControl | None:
        """None if the stage adapts nothing."""
        return cls(stage) if stage.kl.target is not None and kl_weights(stage) else None

    def apply(
        self, batch: Batch, advantage: Component[AdvantageSpec] | None
    ) -> tuple[Batch, Component[AdvantageSpec] | None]:
        """The batch or the advantage, whichever weighs the divergence, with the weight now."""
        now = {self._option: self.coefficient}
        if self._where == "loss":
            return replace(batch, loss_options=now), advantage
        assert advantage is not None
        return batch, replace(advantage, options=replace(advantage.options, **now))

    def learn(self, batch: Batch) -> dict[str, float]:
        """Measures a batch and adapts the weight. Metrics: kl_coef, the weight that it is trained with, and
        kl_measured. A batch without the reference's log-probabilities, or without a trained token, changes nothing."""
        metrics = {"kl_coef": self.coefficient}
        samples = np.unique(batch.segment_ids[batch["mask"]])
        if "ref_logprobs" not in batch or not len(samples):
            return metrics
        divergence = measured(batch, self._section.per)
        self.coefficient = adapted(self.coefficient, divergence, len(samples), self._section)
        return {**metrics, "kl_measured": divergence}


def adapted(coefficient: float, divergence: float, samples: int, section: KLSection) -> float:
    """The weight after a batch."""
    assert section.target is not None
    error = min(max(divergence / section.target - 1, -BOUND), BOUND)
    return coefficient * (1 + error * samples / section.horizon)


def measured(batch: Batch, per: Literal["sequence", "token"]) -> float:
    """The k1 estimate of a batch, over the samples that have a trained token."""
    mask, segments = batch["mask"], batch.segment_ids
    written = batch["old_logprobs" if "old_logprobs" in batch else "rollout_logprobs"]
    difference = (written[mask] - batch["ref_logprobs"][mask]).astype(np.float64)
    sums = np.bincount(segments[mask], difference, minlength=len(batch))
    counts = np.bincount(segments[mask], minlength=len(batch))
    live = counts > 0
    return float((sums[live] / (counts[live] if per == "token" else 1)).mean())
