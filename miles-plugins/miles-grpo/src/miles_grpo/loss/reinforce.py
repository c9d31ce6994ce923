"""The plain policy gradient.

    l_t = -A_t log pi(t)

Williams, Simple statistical gradient-following algorithms, 1992. With the aggregation "sequence-sum" and the advantage
`rloo` this is RLOO; verl calls it "gpg". Its gradient is right only for samples of the policy itself: with several
updates a batch, or a rollout that differs from the trainer, add a correction with policy = "current".
"""

from __future__ import annotations

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.loss.common import finish
from miles_grpo.options import Reinforce


def reinforce(inputs: LossInputs, options: Reinforce) -> LossOutputs:
    """Per-token losses [T]."""
    assert inputs.advantages is not None
    return finish(-inputs.advantages * inputs.logprobs, {}, inputs, options)
