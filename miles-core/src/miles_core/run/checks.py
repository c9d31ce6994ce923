"""What must hold of a batch before it is trained on. Refusals name the sample: prompt id and place in its group."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles_core.errors import RunError
from miles_core.sample import Batch

LOGPROBS = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "teacher_logprobs")


def check_rewards(batch: Batch) -> None:
    """Raises RunError for a reward that is not finite."""
    rewards = batch.samples["reward"]
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise RunError(
            f"{sample_name(batch, bad[0])} has reward {rewards[bad[0]]}, which is not a finite number "
            f"({len(bad)} of {len(batch)} samples are like it); rewards must return finite floats"
        )


def check_logprobs(batch: Batch) -> None:
    """Raises RunError for a trained token whose log-probability is not finite, as far as they are computed."""
    for name in LOGPROBS:
        if name in batch:
            check_tokens(batch, name, batch[name], ~np.isfinite(batch[name]) & batch["mask"], "not finite")


def check_tokens(batch: Batch, name: str, values: NDArray[Any], wrong: NDArray[np.bool_], what: str) -> None:
    """Raises RunError, naming the first token [N] that is `wrong`."""
    places = np.flatnonzero(wrong)
    if len(places):
        sample = int(batch.segment_ids[places[0]])
        token = int(places[0] - batch.cu_seqlens[sample])
        raise RunError(f"{name} is {values[places[0]]} at token {token} of {sample_name(batch, sample)}: {what}")


def sample_name(batch: Batch, row: int) -> str:
    """Names a sample for people."""
    return f"sample {batch.samples['group'][row]}/{batch.samples['index'][row]}"
