"""Loss aggregation as a column: which weight every token has, so that the objective is `sum(weights * losses)`.

A loss gives one value l_t per trained token. How these become the one number that is differentiated is decided here,
once, over the whole batch, and travels as the columns `minibatch` (per sample) and `weights` (per token). Trainers only
sum, so the result cannot depend on packing, micro-batches or parallel layout.

For one mini-batch, with n_s the trained tokens of sample s, S the samples and G the groups that have any:

    token         1 / sum_s n_s             Every token counts the same. DAPO as implemented: TRL "dapo", verl
                                            "token-mean", slime --calculate-per-token-loss.
    sequence      1 / (S n_s)               Every sample counts the same. GRPO and GSPO as published; TRL "grpo", verl
                                            "seq-mean-token-mean", slime's default.
    sequence-sum  1 / S                     The log-probability of a whole sample, as in RLOO and REINFORCE; verl
                                            "seq-mean-token-sum".
    group         1 / (G sum_{s in g} n_s)  Every prompt counts the same. The DAPO paper's equation 8; ScaleRL's prompt
                                            average.
    constant      1 / (S L)                 Dr. GRPO, with L = `aggregation_length`; TRL "dr_grpo", verl
                                            "seq-mean-token-sum-norm".

Samples without a trained token weigh nothing and are not counted in S and G, as in verl; TRL counts them in "grpo" and
"dr_grpo". Failed and aborted samples are never trained. `Sample.weight` multiplies the weights of a sample's tokens and
changes nothing else, so a weight of 2 is not the same as the sample twice. A mini-batch without any trained token has
only zero weights: a step with a zero gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles_core.config.schema import Aggregation, LossSection
from miles_core.run.checks import check_logprobs
from miles_core.sample import Batch

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def aggregate(batch: Batch, loss: LossSection, minibatches: int) -> Batch:
    """The batch with the sample column `minibatch` and the token column `weights` (float64, 0 where masked).

    Depends on the samples themselves alone, not on their order in the batch. Samples that could not be scored, and
    with `loss.mask_truncated` truncated ones, lose their mask here, after the advantages are computed. Runs in the
    collector. Raises ValueError if there are fewer samples than mini-batches, and RunError for a log-probability of a
    trained token that is not finite.
    """
    batch = batch.with_columns(mask=batch["mask"] & _trained(batch, loss)[batch.segment_ids])
    check_logprobs(batch)
    minibatch = split(batch.samples["group"], batch.samples["index"], minibatches)
    segments, mask = batch.segment_ids, batch["mask"]
    tokens = np.bincount(segments[mask], minlength=len(batch)).astype(np.float64)
    counts = _Counts(tokens=tokens, minibatch=minibatch.astype(np.int64), group=batch.samples["group"])
    denominator = _DENOMINATORS[loss.aggregation](counts) * (loss.aggregation_length or 1)
    own = batch.samples.get("weight", np.ones(len(batch)))
    per_sample = np.divide(own, denominator, where=counts.live, out=np.zeros(len(batch)))
    weights = np.where(mask, per_sample[segments], 0.0)
    return batch.with_samples(minibatch=minibatch).with_columns(weights=weights)


def _trained(batch: Batch, loss: LossSection) -> NDArray[np.bool_]:
    """Which samples are trained at all, [S]."""
    trained: NDArray[np.bool_] = batch.samples.get("scored", np.ones(len(batch), np.bool_))
    return trained & ~batch.samples["truncated"] if loss.mask_truncated else trained


def split(groups: NDArray[Any], indices: NDArray[Any], count: int) -> NDArray[np.int32]:
    """Assigns samples [S] to `count` mini-batches of about equal size, in the order of (group, index), int32 [S].

    Groups stay whole if there are at least `count` of them. No mini-batch is empty; ValueError if S < count.
    """
    if len(groups) < count:
        raise ValueError(f"{len(groups)} samples cannot be split into {count} mini-batches")
    order = np.lexsort((indices, groups))
    ordered = groups[order]
    cuts = np.flatnonzero(np.diff(ordered)) + 1
    if len(cuts) + 1 < count:
        cuts = np.arange(1, len(groups))
    starts = _nearest_cuts(cuts, len(groups), count)
    minibatch = np.empty(len(groups), np.int32)
    minibatch[order] = np.searchsorted(starts, np.arange(len(groups)), side="right")
    return minibatch


def _nearest_cuts(cuts: Ints, total: int, count: int) -> list[int]:
    """The `count - 1` of the allowed cuts that lie nearest to an even split, increasing."""
    chosen: list[int] = []
    first = 0
    for part in range(1, count):
        last = len(cuts) - (count - part)  # leaves a cut for each later mini-batch
        place = first + int(np.argmin(np.abs(cuts[first : last + 1] - part * total / count)))
        chosen.append(int(cuts[place]))
        first = place + 1
    return chosen


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """tokens: trained tokens of each sample; minibatch and group: of each sample; all [S]."""

    tokens: Floats
    minibatch: Ints
    group: Ints

    @property
    def live(self) -> NDArray[np.bool_]:
        """Samples that have a trained token."""
        return self.tokens > 0

    @property
    def minibatch_tokens(self) -> Floats:
        """Trained tokens of each sample's mini-batch."""
        return _totals(self.tokens, self.minibatch)

    @property
    def minibatch_samples(self) -> Floats:
        """Samples with a trained token in each sample's mini-batch."""
        return _totals(self.live.astype(np.float64), self.minibatch)

    @property
    def _part(self) -> Ints:
        """Which part of a group, the part that lies in one mini-batch, each sample belongs to."""
        pairs = np.stack([self.group, self.minibatch])
        return np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)

    @property
    def group_tokens(self) -> Floats:
        """Trained tokens of each sample's group, as far as it lies in the same mini-batch."""
        return _totals(self.tokens, self._part)

    @property
    def minibatch_groups(self) -> Floats:
        """Groups with a trained token in each sample's mini-batch."""
        first = np.zeros(len(self.tokens))
        live = np.flatnonzero(self.live)
        first[live[np.unique(self._part[live], return_index=True)[1]]] = 1.0
        return _totals(first, self.minibatch)


def _totals(values: Floats, keys: Ints) -> Floats:
    """The sum of `values` [S] over all samples with the same key, at each sample."""
    totals: Floats = np.bincount(keys, values).astype(np.float64)
    return totals[keys]


_DENOMINATORS: dict[Aggregation, Callable[[_Counts], Floats]] = {
    "token": lambda counts: counts.minibatch_tokens,
    "sequence": lambda counts: counts.minibatch_samples * counts.tokens,
    "sequence-sum": lambda counts: counts.minibatch_samples,
    "group": lambda counts: counts.minibatch_groups * counts.group_tokens,
    "constant": lambda counts: counts.minibatch_samples,
}
