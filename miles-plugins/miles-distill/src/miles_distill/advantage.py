"""On-policy distillation on sampled tokens: a token is as good as the teacher finds it likelier than the policy did.

    d_t = log teacher(t) - log pi(t)
    A_t = sum over the trained tokens u >= t of the sample of gamma^(u - t) d_u   [+ reward_coef (r - mean) / std]

-d_t is the one-sample estimate (k1) of the reverse KL(pi || teacher) at that place. As an advantage it gives the
gradient of that divergence: E[-grad log pi(t) d_t] = grad KL(pi || teacher), the tokens before t held fixed. (As a
loss it would not: the gradient of k1 itself does not depend on the teacher.) gamma > 0 also counts what a token leads
to, as MiniLLM does; Lu et al. saw no gain from it.

Lu and Thinking Machines Lab, On-Policy Distillation, 2025, thinkingmachines.ai/blog/on-policy-distillation; Agarwal et
al., GKD, arXiv 2306.13649; Gu et al., MiniLLM, arXiv 2306.08543. With a reward beside it: slime, and MiMo-V2-Flash,
arXiv 2601.02780. A policy loss goes with it, such as `reinforce` or `grpo` of miles-grpo.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from miles_core.roles import AdvantageInputs
from miles_distill.options import ReverseKL
from miles_grpo.advantage.groups import normalised, sizes, spread
from miles_grpo.advantage.scan import discounted, ends

Floats = NDArray[np.float64]

REWARD_EPS = 1e-6
"""Added to the standard deviation of a prompt's rewards, as in the advantage `grpo`."""


def reverse_kl(inputs: AdvantageInputs, options: ReverseKL) -> Mapping[str, Floats]:
    """Advantages [N]. Raises ValueError if the reward counts and no prompt has two samples to compare."""
    mask = inputs.mask
    policy = inputs.columns["old_logprobs" if options.recompute else "rollout_logprobs"]
    difference = (inputs.columns["teacher_logprobs"][mask].astype(np.float64) - policy[mask]).astype(np.float64)
    if options.clamp is not None:
        difference = np.clip(difference, -options.clamp, options.clamp)
    advantages = np.zeros(len(mask))
    decays = np.where(ends(inputs.segment_ids[mask]), 0.0, options.gamma)
    advantages[mask] = discounted(difference, decays) if options.gamma else difference
    if options.reward_coef:
        if len(inputs.rewards) and sizes(inputs.groups).max() < 2:
            raise ValueError(
                "reward_coef compares the samples of a prompt; set schedule.samples_per_prompt to 2 or more"
            )
        rewards = normalised(inputs.rewards, inputs.groups, "sample", REWARD_EPS)
        advantages += spread(options.reward_coef * rewards, inputs)
    return {"advantages": advantages}
