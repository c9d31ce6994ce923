"""A policy gradient whose importance weight is bounded."""

from collections.abc import Iterable
from dataclasses import dataclass

from miles_core import LossSpec, hookimpl
from miles_core.specs import Options


@hookimpl
def miles_losses() -> Iterable[LossSpec]:
    yield LossSpec(
        name="bounded",
        ref="acme_bounded:bounded",
        options="acme_bounded:BoundedOptions",
        needs=frozenset({"advantages", "old_logprobs"}),
        summary="Policy gradient with a bounded importance weight",
    )


@dataclass(frozen=True, kw_only=True)
class BoundedOptions:
    """most: bound on a token's importance weight."""

    most: float = 2.0

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most must be at least 1, got {self.most}")


def bounded(inputs, options: Options):
    """-min(pi / pi_old, most) * advantage * log pi of every trained token; nothing is averaged here."""
    from miles_core.roles import LossOutputs

    ratio = (inputs.logprobs - inputs.old_logprobs).detach().clamp(max=20.0).exp().clamp(max=options.most)
    return LossOutputs(losses=-ratio * inputs.advantages * inputs.logprobs, metrics={"ratio": ratio})
