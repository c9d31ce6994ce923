"""Miles plugin: proximal policy optimisation with a critic."""

from collections.abc import Iterable

from miles_core import AdvantageSpec, LossSpec, RecipeSpec, hookimpl


@hookimpl
def miles_advantages() -> Iterable[AdvantageSpec]:
    """The advantage of a critic."""
    yield AdvantageSpec(
        name="gae",
        ref="miles_ppo.advantage:gae",
        options="miles_ppo.options:GAE",
        needs=frozenset({"values"}),
        needs_if={"old_logprobs": "kl_coef", "ref_logprobs": "kl_coef"},
        kl_coef="kl_coef",
        gives=frozenset({"advantages", "returns"}),
        summary="Generalised advantage estimation from a critic's values, whitened over the batch",
    )


@hookimpl
def miles_losses() -> Iterable[LossSpec]:
    """Losses of a policy and its critic."""
    yield LossSpec(
        name="ppo",
        ref="miles_grpo.loss.clipped:clipped",
        options="miles_grpo.options:ClippedLoss",
        trains="actor",
        needs=frozenset({"advantages", "old_logprobs"}),
        needs_if={"ref_logprobs": "kl_coef"},
        kl_coef="kl_coef",
        entropy_if="entropy_coef",
        summary="Clipped surrogate of a policy beside a critic",
    )
    yield LossSpec(
        name="critic",
        ref="miles_ppo.loss:critic",
        options="miles_ppo.options:Critic",
        trains="critic",
        needs=frozenset({"returns", "values"}),
        summary="Clipped squared error of the critic",
    )


@hookimpl
def miles_recipes() -> Iterable[RecipeSpec]:
    """A run file that needs nothing but a laptop."""
    yield RecipeSpec(
        name="arithmetic-ppo",
        ref="miles_ppo:recipes/arithmetic-ppo.toml",
        requires=("miles-grpo", "miles-torch", "miles-sft", "miles-rewards", "miles-qwen", "miles-trackers"),
        summary="arithmetic by PPO: a critic beside the policy",
    )
