"""Miles plugin: verifiable rewards, and reasoning-gym as a data source."""

from collections.abc import Iterable

from miles_core import DataSourceSpec, RewardSpec, hookimpl


@hookimpl
def miles_rewards() -> Iterable[RewardSpec]:
    """The rewards of this plugin."""
    yield RewardSpec(
        name="exact",
        ref="miles_rewards.exact:Exact",
        options="miles_rewards.options:Exact",
        needs_answer=True,
        summary="1 if the response is the reference answer, up to case and spaces as asked for.",
    )
    yield RewardSpec(
        name="number",
        ref="miles_rewards.number:Number",
        options="miles_rewards.options:Number",
        needs_answer=True,
        summary="1 if the boxed or last number of the response is the reference answer's.",
    )
    yield RewardSpec(
        name="math-verify",
        ref="miles_rewards.math:MathVerify",
        options="miles_rewards.options:MathVerify",
        needs_answer=True,
        summary="1 if the response's final expression is mathematically the reference answer (library math-verify).",
    )
    yield RewardSpec(
        name="reasoning-gym",
        ref="miles_rewards.gym:GymReward",
        options="miles_rewards.options:GymReward",
        example="miles_rewards.examples:gym_reward",
        summary="The score that a reasoning-gym task's own verifier gives.",
    )
    yield RewardSpec(
        name="length-penalty",
        ref="miles_rewards.length:LengthPenalty",
        options="miles_rewards.options:LengthPenalty",
        example="miles_rewards.examples:length_penalty",
        summary="0 up to a length, then falling to -1 at the longest (DAPO's soft overlong punishment).",
    )


@hookimpl
def miles_data_sources() -> Iterable[DataSourceSpec]:
    """The data source of this plugin."""
    yield DataSourceSpec(
        name="reasoning-gym",
        ref="miles_rewards.gym:GymData",
        options="miles_rewards.options:GymData",
        check="miles_rewards.gym_look:check",
        example="miles_rewards.examples:gym_data",
        answers=True,
        summary="Problems that a reasoning-gym task makes up, without end.",
    )
