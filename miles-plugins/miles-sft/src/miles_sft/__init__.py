"""Miles plugin: supervised fine-tuning through the same loop as reinforcement learning."""

from collections.abc import Iterable

from miles_core import LossSpec, RolloutSpec, hookimpl


@hookimpl
def miles_losses() -> Iterable[LossSpec]:
    """The loss of supervised fine-tuning."""
    yield LossSpec(name="sft", ref="miles_sft.loss:sft", summary="Negative log-likelihood of the response")


@hookimpl
def miles_rollouts() -> Iterable[RolloutSpec]:
    """A rollout that takes its responses from the data."""
    yield RolloutSpec(
        name="supervised",
        ref="miles_sft.rollout:Supervised",
        engine=False,
        summary="The prompt's reference answer as the response, ended by the end-of-sequence token",
    )
