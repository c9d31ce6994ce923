"""A correction that lets tokens count less where trainer and engine disagree."""

from collections.abc import Iterable

from miles_core import CorrectionSpec, hookimpl


@hookimpl
def miles_corrections() -> Iterable[CorrectionSpec]:
    yield CorrectionSpec(
        name="agreement",
        ref="acme_soft:agreement",
        summary="exp(-|log trainer - log engine|): 1 where they agree, less where they do not",
    )


def agreement(inputs, options):
    from miles_core.roles import CorrectionOutputs

    distance = (inputs.old_logprobs - inputs.rollout_logprobs).abs()
    return CorrectionOutputs(weights=(-distance).exp(), metrics={"distance": distance})
