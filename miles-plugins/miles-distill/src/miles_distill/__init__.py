"""Miles plugin: on-policy distillation from a teacher that an engine serves."""

from collections.abc import Iterable

from miles_core import AdvantageSpec, LossSpec, RecipeSpec, hookimpl


@hookimpl
def miles_advantages() -> Iterable[AdvantageSpec]:
    """The teacher's opinion of each sampled token."""
    yield AdvantageSpec(
        name="reverse-kl",
        ref="miles_distill.advantage:reverse_kl",
        options="miles_distill.options:ReverseKL",
        needs=frozenset({"rollout_logprobs", "teacher_logprobs"}),
        needs_if={"old_logprobs": "recompute"},
        rewards_if="reward_coef",
        summary="How much likelier the teacher finds each sampled token than the policy did",
    )


@hookimpl
def miles_losses() -> Iterable[LossSpec]:
    """The divergence from the teacher at each place."""
    yield LossSpec(
        name="distill",
        ref="miles_distill.loss:distill",
        options="miles_distill.options:Distill",
        needs=frozenset({"teacher_top_tokens", "teacher_top_logprobs"}),
        top_k="top_k",
        summary="Reverse, forward or Jensen-Shannon divergence from the teacher on its likeliest tokens",
    )


@hookimpl
def miles_recipes() -> Iterable[RecipeSpec]:
    """A run file that needs nothing but a laptop, and what `miles train arithmetic` leaves."""
    yield RecipeSpec(
        name="arithmetic-distill",
        ref="miles_distill:recipes/arithmetic-distill.toml",
        example="miles_distill.examples:with_teacher",
        requires=("miles-torch", "miles-sft", "miles-rewards", "miles-qwen", "miles-trackers"),
        summary="A smaller model learns to add from the one that the recipe arithmetic has made",
    )
