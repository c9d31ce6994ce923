"""Filters that core offers: which scored groups are worth training on."""

from __future__ import annotations

from miles_core.sample import Group


class NonzeroStd:
    """Keeps a group whose rewards are not all equal: of equal rewards, a group-relative advantage learns nothing.

    Samples that could not be scored say nothing about the prompt and do not count. Runs in the collector.
    """

    def __init__(self, options: None = None) -> None: ...

    def keep(self, group: Group) -> bool:
        """True if two scored samples differ in reward."""
        return len({sample.reward for sample in group if sample.status != "failed"}) > 1
