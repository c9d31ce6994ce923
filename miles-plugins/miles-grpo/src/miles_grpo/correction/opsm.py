"""Off-policy sequence masking: bad samples that the policy has moved away from are left alone.

A token is masked where A_t < 0 and, over its sequence, mean(log rollout(t) - log pi(t)) > delta, pi the policy now.

DeepSeek-V3.2, arXiv 2512.02556, section 3.1; TRL's off_policy_mask_threshold, slime's --use-opsm.
"""

from __future__ import annotations

from miles_core.roles import CorrectionInputs, CorrectionOutputs
from miles_grpo.correction.ratio import log_ratio
from miles_grpo.options import OPSM


def opsm(inputs: CorrectionInputs, options: OPSM) -> CorrectionOutputs:
    """Weights [T], 0 or 1. Metrics: masked (1 where a token is masked)."""
    assert inputs.advantages is not None
    segments = inputs.segments
    drift = segments.spread(segments.mean(-log_ratio(inputs, "current")))
    masked = ((inputs.advantages < 0) & (drift > options.delta)).to(drift.dtype)
    return CorrectionOutputs(weights=1 - masked, metrics={"masked": masked})
