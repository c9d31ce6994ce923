"""Miles plugin: proximal policy optimisation with a critic."""

from collections.abc import Iterable

from miles_core import AdvantageSpec, LossSpec, hookimpl


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
