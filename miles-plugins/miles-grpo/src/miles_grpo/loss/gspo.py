"""GSPO: the ratio of a whole sequence, as the geometric mean of its tokens' ratios.

With s_i = exp(mean over the trained tokens t of sequence i of log pi(t) - log pi_old(t)):

    gspo         l_t = -min(s_i A_t, clip(s_i) A_t)
    gspo-token   the same with s_i,t = sg[s_i] pi(t) / sg[pi(t)], whose value is s_i and whose gradient is the token's

Zheng et al., Group Sequence Policy Optimization, arXiv 2507.18071, sections 4.1 and 4.3. With the aggregation
"sequence" and one advantage per sequence both have the same value and the same gradient; with advantages that differ
from token to token only gspo-token weighs each token by its own. TRL (importance_sampling_level="sequence"), OpenRLHF
and AReaL compute the first, verl the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.bounds import bounded_exp
from miles_grpo.loss.common import clip_metrics, finish, log_ratio, pessimistic
from miles_grpo.options import GSPO

if TYPE_CHECKING:
    from torch import Tensor


def gspo(inputs: LossInputs, options: GSPO) -> LossOutputs:
    """Per-token losses [T], the gradient through the sequence's ratio."""
    segments = inputs.segments
    return _clipped(segments.spread(segments.mean(log_ratio(inputs))), inputs, options)


def gspo_token(inputs: LossInputs, options: GSPO) -> LossOutputs:
    """Per-token losses [T], the gradient through each token's own log-probability."""
    segments = inputs.segments
    of_sequence = segments.spread(segments.mean(log_ratio(inputs))).detach()
    return _clipped(of_sequence + inputs.logprobs - inputs.logprobs.detach(), inputs, options)


def _clipped(logarithm: Tensor, inputs: LossInputs, options: GSPO) -> LossOutputs:
    assert inputs.advantages is not None
    ratio = bounded_exp(logarithm)
    low, high = 1 - options.clip_low, 1 + options.clip_high
    losses = pessimistic(ratio, inputs.advantages, low, high)
    return finish(losses, clip_metrics(ratio, inputs.advantages, low, high), inputs, options)
