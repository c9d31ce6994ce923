"""A trainer that keeps a moving average of the weights and saves that as the policy."""

from collections.abc import Iterable
from dataclasses import dataclass

from miles_core import TrainerSpec, hookimpl
from miles_torch.options import TrainerOptions


@hookimpl
def miles_trainers() -> Iterable[TrainerSpec]:
    yield TrainerSpec(
        name="averaged",
        ref="acme_averaged_trainer:AveragedTrainer",
        options="acme_averaged:AveragedOptions",
        gives=frozenset({"old_logprobs", "ref_logprobs"}),
        devices=frozenset({"cpu"}),
        summary="The trainer torch, whose saved policy is a moving average of the weights",
    )


@dataclass(frozen=True, kw_only=True)
class AveragedOptions(TrainerOptions):
    """decay: share of the average that stays at each step."""

    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
