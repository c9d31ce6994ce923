"""Options of the trainer `megatron`: `[trainer]` of a run file.

Nothing of Megatron's is declared again here: the tables hold fields of its own configuration classes by their own
names, and `miles_megatron.surface` checks them against the installed Megatron-core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miles_megatron import surface


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """The trainer `megatron`.

    micro_batch_tokens: most tokens of one forward and backward pass of a data-parallel rank (a longer sample runs
    alone); results do not depend on it, memory does.
    transformer, parallel, optimizer, scheduler, ddp, checkpoint: fields of Megatron-core's TransformerConfig,
    ModelParallelConfig, OptimizerConfig, SchedulerConfig, DistributedDataParallelConfig and CheckpointConfig, by their
    own names.
    """

    micro_batch_tokens: int = 16384
    transformer: Mapping[str, Any] = field(default_factory=dict)
    parallel: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.micro_batch_tokens < 1:
            raise ValueError(f"trainer.micro_batch_tokens must be at least 1, got {self.micro_batch_tokens}")
        for section in surface.SECTIONS:
            surface.check(section, getattr(self, section))
