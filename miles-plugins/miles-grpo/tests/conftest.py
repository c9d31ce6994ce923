"""Random packed inputs for losses and advantages, and gradients of them."""

from __future__ import annotations

import pytest
import torch

from miles_core.roles import LossInputs, Segments


@pytest.fixture
def loss_inputs():
    """Builds float64 inputs of the given sample lengths; `spread` scales how far the policies are apart."""

    def build(lengths=(3, 1, 5, 2), *, seed=0, spread=0.3) -> LossInputs:
        generator = torch.Generator().manual_seed(seed)
        total = sum(lengths)

        def normal(scale: float) -> torch.Tensor:
            return scale * torch.randn(total, generator=generator, dtype=torch.float64)

        base = -normal(1.0).abs() - 0.1
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
        return LossInputs(
            logprobs=(base + normal(spread)).requires_grad_(),
            segments=Segments(ids=ids, count=len(lengths)),
            advantages=normal(1.0),
            old_logprobs=base,
            rollout_logprobs=base + normal(spread / 3),
            ref_logprobs=base + normal(spread),
        )

    return build
