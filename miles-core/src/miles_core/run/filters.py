"""Filters that core offers: which scored groups are worth training on."""

from __future__ import annotations

from miles_core.run.filter_options import RewardRangeOptions
from miles_core.sample import Group


class NonzeroStd:
    """Keeps a group whose rewards are not all equal: of equal rewards, a group-relative advantage learns nothing.

    Samples that could not be scored say nothing about the prompt and do not count. Runs in the collector.
    """

    def __init__(self, options: None = None) -> None: ...

    def keep(self, group: Group) -> bool:
        """True if two scored samples differ in reward."""
        return len({sample.reward for sample in group if sample.status != "failed"}) > 1


class NoAborted:
    """Keeps a group whose samples were all generated to their end. Runs in the collector."""

    def __init__(self, options: None = None) -> None: ...

    def keep(self, group: Group) -> bool:
        """True if no sample was aborted."""
        return all(sample.status != "aborted" for sample in group)


class RewardRange:
    """Keeps a group whose mean reward lies between two bounds: a prompt that is neither too hard nor too easy.

    Samples that could not be scored do not count; a group without any other is dropped. Runs in the collector.
    """

    def __init__(self, options: RewardRangeOptions) -> None:
        self._options = options

    def keep(self, group: Group) -> bool:
        """True if low < mean < high."""
        rewards = [sample.reward for sample in group if sample.status != "failed" and sample.reward is not None]
        return bool(rewards) and self._options.low < sum(rewards) / len(rewards) < self._options.high
