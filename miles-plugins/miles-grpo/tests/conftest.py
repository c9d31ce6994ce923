"""Random packed inputs for losses and corrections."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from miles_core.roles import LossInputs, Segments

torch.set_num_threads(1)


@pytest.fixture
def loss_inputs():
    """Builds float64 inputs of the given sample lengths; `spread` scales how far the policies are apart."""

    def build(lengths=(3, 1, 5, 2), *, seed=0, spread=0.3) -> LossInputs:
        generator = torch.Generator().manual_seed(seed)
        total = sum(lengths)

        def normal(scale: float) -> torch.Tensor:
            return scale * torch.randn(total, generator=generator, dtype=torch.float64)

        base = -normal(1.0).abs() - 3.5 * spread
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
        return LossInputs(
            logprobs=(base + normal(spread)).clamp(max=-0.01).requires_grad_(),
            segments=Segments(ids=ids, count=len(lengths)),
            advantages=normal(1.0),
            old_logprobs=base,
            rollout_logprobs=(base + normal(spread / 3)).clamp(max=-0.01),
            ref_logprobs=(base + normal(spread)).clamp(max=-0.01),
            entropy=normal(1.0).abs().requires_grad_(),
        )

    return build


@pytest.fixture
def sequences():
    """Splits inputs into one record per sample, which share the leaf `logprobs`."""

    def split(inputs: LossInputs) -> list[LossInputs]:
        pieces = []
        for number in range(inputs.segments.count):
            rows = (inputs.segments.ids == number).nonzero()[:, 0]
            columns = {
                field.name: getattr(inputs, field.name)[rows]
                for field in fields(inputs)
                if isinstance(getattr(inputs, field.name), torch.Tensor)
            }
            pieces.append(replace(inputs, segments=Segments(ids=torch.zeros_like(rows), count=1), **columns))
        return pieces

    return split
