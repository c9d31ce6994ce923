"""The way into Megatron-core: what stands in for CUDA on a CPU has to be in place before it is imported."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from miles_core.roles import TrainerContext
from miles_megatron import surface
from miles_megatron.options import TrainerOptions


def prepare() -> None:
    """Makes `megatron.core` importable in this process. Raises `MissingExtraError` if it is not installed.

    Megatron's remarks on what is not installed or will change are silenced: they are for its own users.
    """
    surface.root()
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=r".torch\.distributed\.\w+. is deprecated", category=FutureWarning)
    from miles_megatron import cpu

    if cpu.install():
        cpu.patch_megatron()


def make_critic(options: TrainerOptions, context: TrainerContext) -> Any:
    """A `roles.Critic` on Megatron-core."""
    prepare()
    from miles_megatron.critic import MegatronCritic

    return MegatronCritic(options, context)


def make_trainer(options: TrainerOptions, context: TrainerContext) -> Any:
    """A `roles.Trainer` on Megatron-core."""
    prepare()
    from miles_megatron.trainer import MegatronTrainer

    return MegatronTrainer(options, context)
