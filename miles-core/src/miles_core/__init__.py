"""Miles: reinforcement-learning post-training of large language models. This is the core: contract, loop, cluster.

The public surface for plugin authors is what `__all__` lists; everything else may change between releases.
"""

from typing import TYPE_CHECKING, Any

from miles_core.hooks import hookimpl
from miles_core.specs import (
    AdvantageSpec,
    CallbackSpec,
    CommandSpec,
    CorrectionSpec,
    DataSourceSpec,
    EngineSpec,
    FilterSpec,
    LossSpec,
    ModelSpec,
    RecipeSpec,
    RewardSpec,
    RolloutSpec,
    TrackerSpec,
    TrainerSpec,
    WeightSyncSpec,
)

if TYPE_CHECKING:
    from miles_core.sample import Batch, Completion, Group, Prompt, Request, Sample, Sampling, ScoreRequest, Scores

__version__ = "0.1.0"
PLUGIN_API = 1
"""Rises when a hook or a record changes in a way that breaks plugins; recorded in every run."""

__all__ = [
    "PLUGIN_API",
    "AdvantageSpec",
    "Batch",
    "CallbackSpec",
    "CommandSpec",
    "Completion",
    "CorrectionSpec",
    "DataSourceSpec",
    "EngineSpec",
    "FilterSpec",
    "Group",
    "LossSpec",
    "ModelSpec",
    "Prompt",
    "RecipeSpec",
    "Request",
    "RewardSpec",
    "RolloutSpec",
    "Sample",
    "Sampling",
    "ScoreRequest",
    "Scores",
    "TrackerSpec",
    "TrainerSpec",
    "WeightSyncSpec",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    """The data classes are imported on first use: they need numpy, which plugin modules and `miles --help` do not."""
    if name in __all__:
        from miles_core import sample

        return getattr(sample, name)
    raise AttributeError(f"module 'miles_core' has no attribute {name!r}")
