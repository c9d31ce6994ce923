"""Miles plugin: group-relative policy optimisation and its family."""

from collections.abc import Iterable

from miles_core import AdvantageSpec, LossSpec, hookimpl

_KL = {"ref_logprobs": "kl_coef"}


@hookimpl
def miles_advantages() -> Iterable[AdvantageSpec]:
    """Advantages that compare the samples of one prompt."""
    yield AdvantageSpec(
        name="grpo",
        ref="miles_grpo.advantage.grpo:grpo",
        options="miles_grpo.options:GRPOAdvantage",
        groups=True,
        summary="Reward minus the group's mean, divided by the group's standard deviation",
    )


@hookimpl
def miles_losses() -> Iterable[LossSpec]:
    """Policy losses."""
    yield LossSpec(
        name="grpo",
        ref="miles_grpo.loss.clipped:clipped",
        options="miles_grpo.options:ClippedLoss",
        needs=frozenset({"advantages", "old_logprobs"}),
        needs_if=_KL,
        summary="Clipped surrogate with separate bounds, dual clip and KL to a reference",
    )
