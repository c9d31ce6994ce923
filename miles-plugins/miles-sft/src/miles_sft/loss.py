"""Supervised fine-tuning: the negative log-likelihood of the response, l_t = -log pi(t).

With loss.aggregation "token" this is the usual cross-entropy averaged over all response tokens of a mini-batch. Ouyang
et al., Training language models to follow instructions with human feedback, arXiv 2203.02155, section 3.5.
"""

from __future__ import annotations

from miles_core.roles import LossInputs, LossOutputs


def sft(inputs: LossInputs, options: None) -> LossOutputs:
    """Per-token losses [T]. Metric: probability, of the reference tokens."""
    return LossOutputs(losses=-inputs.logprobs, metrics={"probability": inputs.logprobs.detach().exp()})
