"""Miles plugin: 1 if the response ends with the reference answer, less if it has it elsewhere."""

from collections.abc import Iterable

from miles_core import RewardSpec, hookimpl


@hookimpl
def miles_rewards() -> Iterable[RewardSpec]:
    """The reward of this plugin."""
    yield RewardSpec(
        name="acme-suffix-reward",
        ref="acme_suffix_reward.reward:AcmeSuffixReward",
        options="acme_suffix_reward.options:AcmeSuffixReward",
        needs_answer=True,
        summary="1 if the response ends with the reference answer, less if it has it elsewhere.",
    )
