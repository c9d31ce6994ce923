"""An advantage that only asks which sample of a prompt is better, and not by how much."""

from collections.abc import Iterable

from miles_core import AdvantageSpec, hookimpl


@hookimpl
def miles_advantages() -> Iterable[AdvantageSpec]:
    yield AdvantageSpec(
        name="rank",
        ref="acme_rank:rank",
        groups=True,
        summary="The share of the prompt's other samples that are worse, minus the share that are better",
    )


def rank(inputs, options):
    """Of sample i: mean over the others of sign(reward_i - reward_j)."""
    import numpy as np

    same = inputs.groups[:, None] == inputs.groups[None, :]
    better = np.sign(inputs.rewards[:, None] - inputs.rewards[None, :]) * same
    others = np.maximum(same.sum(axis=1) - 1, 1)
    per_sample = better.sum(axis=1) / others
    return {"advantages": np.where(inputs.mask, per_sample[inputs.segment_ids], 0.0)}
