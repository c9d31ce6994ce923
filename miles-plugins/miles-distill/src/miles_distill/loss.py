"""Distillation on whole distributions: the divergence of policy and teacher at each place of a sampled response.

With the teacher's K likeliest tokens y, p(y) the policy's and q(y) the teacher's probability of them:

    reverse    l_t = sum p log(p / q)
    forward    l_t = sum q log(q / p)
    jsd        l_t = beta sum q log(q / m) + (1 - beta) sum p log(p / m),   m = beta q + (1 - beta) p

An engine gives no more than K tokens of its distribution, so something has to be said of the others, the tail:

    bucket         they are one more token, with probability 1 - sum: a divergence of coarser distributions, so never
                   above the true one, and 0 only where they agree. TRL (loss_add_tail)
    renormalise    p and q are divided by their sums: how much lies outside does not count, and nothing holds the policy
                   back from moving there. TRL without the tail
    drop           the sum as it is; of the forward divergence alone. verl (forward_kl_topk), which also bounds
                   log-probabilities from below and the loss to [0, 10]

TRL takes the policy's likeliest tokens for the reverse divergence, which a served teacher cannot score at once. Nothing
is differentiated but p: the policy that draws the next response is left out, as in GKD.

Agarwal et al., On-Policy Distillation of Language Models (GKD), arXiv 2306.13649; TRL's beta = 0 is "forward", 1
"reverse". Shapes: T trained tokens; K.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from miles_core.roles import LossInputs, LossOutputs
from miles_distill.options import Distill

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_TOTAL = -1e-7
"""Bound on the logarithm of what the K tokens' probabilities sum to, so that the tail has one too; as in TRL."""


def distill(inputs: LossInputs, options: Distill) -> LossOutputs:
    """Per-token losses [T]. Metrics: policy_mass, teacher_mass: what the teacher's likeliest tokens sum to."""
    assert inputs.top_logprobs is not None
    assert inputs.teacher_top_logprobs is not None
    metrics = {
        "policy_mass": inputs.top_logprobs.detach().exp().sum(-1),
        "teacher_mass": inputs.teacher_top_logprobs.exp().sum(-1),
    }
    policy, teacher = (_parts(each, options) for each in (inputs.top_logprobs, inputs.teacher_top_logprobs))
    losses = [_divergence(ours, theirs, options) for ours, theirs in zip(policy, teacher, strict=True)]
    return LossOutputs(losses=losses[0] if len(losses) == 1 else losses[0] + losses[1], metrics=metrics)


def _parts(logprobs: Tensor, options: Distill) -> tuple[Tensor, ...]:
    """The log-probabilities that are compared: [T, K], and with the bucket [T, 1]."""
    if options.tail == "drop":
        return (logprobs,)
    total = logprobs.logsumexp(-1, keepdim=True)
    if options.tail == "renormalise":
        return (logprobs - total,)
    return logprobs, (-total.clamp(max=LARGEST_TOTAL).expm1()).log()


def _divergence(policy: Tensor, teacher: Tensor, options: Distill) -> Tensor:
    """These tokens' part of it, [T, K] -> [T]."""
    if options.divergence == "reverse":
        return _kl(policy, teacher)
    if options.divergence == "forward":
        return _kl(teacher, policy)
    mixture = (teacher + math.log(options.beta)).logaddexp(policy + math.log(1 - options.beta))
    return options.beta * _kl(teacher, mixture) + (1 - options.beta) * _kl(policy, mixture)


def _kl(left: Tensor, right: Tensor) -> Tensor:
    """sum left log(left / right), [T, K] -> [T]."""
    return (left.exp() * (left - right)).sum(-1)
