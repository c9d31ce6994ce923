"""SAPO: a soft gate in the place of the clip.

    l_t = -(4 / tau) sigmoid(tau (ratio_t - 1)) A_t,   tau = tau_positive where A_t > 0, else tau_negative

The factor makes the gradient that of REINFORCE at ratio 1. Gao et al., Soft Adaptive Policy Optimization,
arXiv 2511.20347.
"""

from __future__ import annotations

from miles_core.roles import LossInputs, LossOutputs
from miles_grpo.bounds import bounded_exp
from miles_grpo.loss.common import finish, log_ratio
from miles_grpo.options import SAPO


def sapo(inputs: LossInputs, options: SAPO) -> LossOutputs:
    """Per-token losses [T]. Metrics: ratio, and gate: the gradient's share of REINFORCE's, 1 at ratio 1."""
    assert inputs.advantages is not None
    ratio = bounded_exp(log_ratio(inputs))
    positive = inputs.advantages > 0
    tau = ratio.new_full((), options.tau_positive).where(positive, ratio.new_full((), options.tau_negative))
    gate = (tau * (ratio - 1)).sigmoid()
    losses = -4 / tau * gate * inputs.advantages
    metrics = {"ratio": ratio.detach(), "gate": (4 * gate * (1 - gate)).detach()}
    return finish(losses, metrics, inputs, options)
