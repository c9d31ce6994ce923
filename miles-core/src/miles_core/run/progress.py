"""What a stage has under way: which groups are begun, which are done, and which prompts are to be drawn again.

A group that nobody waits for any more, because enough others were done before it, is thrown back: its task is
cancelled while it generates, what it gives later counts for nothing, and its prompt is drawn again before new ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from miles_core.sample import Group


@dataclass(kw_only=True)
class Progress:
    """version: that trains next, counted from the stage's first. used: groups that have been handed over.

    position: of the next prompt to draw. again: positions to draw again, after a resume or because they were thrown
    back. begun: group -> version at which it was begun, for all that is not used up. done: scored groups that wait to
    be trained on, in the order in which they were done. tasks: of the groups under way; generating: those among them
    that wait for an engine; unwanted: those of groups that were thrown back.

    dropped, failed, oversampled: groups that filters dropped, samples that could not be scored, and groups thrown back,
    all since the last batch. failed_in_a_row: groups of which every sample failed.
    """

    version: int = 0
    used: int = 0
    position: int = 0
    again: list[int] = field(default_factory=list)
    begun: dict[int, int] = field(default_factory=dict)
    done: dict[int, Group] = field(default_factory=dict)
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    generating: set[asyncio.Task[None]] = field(default_factory=set)
    unwanted: set[asyncio.Task[None]] = field(default_factory=set)
    error: BaseException | None = None
    dropped: int = 0
    failed: int = 0
    oversampled: int = 0
    failed_in_a_row: int = 0

    @property
    def running(self) -> list[int]:
        """Groups under way."""
        return [group for group in self.begun if group not in self.done]

    def draw(self) -> int:
        """The position of a prompt to begin with."""
        if self.again:
            return self.again.pop(0)
        self.position += 1
        return self.position - 1

    def drop(self, group: int) -> None:
        """A filter does not want it."""
        del self.begun[group], self.tasks[group]
        self.dropped += 1

    def hand_over(self, groups: Iterable[int]) -> list[Group]:
        """The samples of groups that are trained on now."""
        taken = []
        for group in groups:
            taken.append(self.done.pop(group))
            del self.begun[group]
            self.tasks.pop(group, None)  # what was restored has none
            self.used += 1
        return taken

    def throw_back(self, oldest: int) -> None:
        """Whatever was begun at a version before `oldest` would be too stale from now on."""
        late = sorted(group for group, version in self.begun.items() if version < oldest)
        for group in late:
            del self.begun[group]
            self.done.pop(group, None)
            task = self.tasks.pop(group, None)
            if task is None or task.done():
                continue
            self.unwanted.add(task)
            task.add_done_callback(self.unwanted.discard)
            if task in self.generating:
                task.cancel()
        self.again = sorted([*self.again, *late])
        self.oversampled += len(late)

    def counts(self) -> dict[str, float]:
        """The counts since the last batch, which begin again."""
        found = {"dropped": self.dropped, "failed": self.failed, "oversampled": self.oversampled}
        self.dropped = self.failed = self.oversampled = 0
        return {name: float(count) for name, count in found.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, beside the groups that are done: what is under way is to be made again."""
        return {
            "position": self.position,
            "again": sorted([*self.again, *self.running]),
            "dropped": self.dropped,
            "failed": self.failed,
            "oversampled": self.oversampled,
        }

    def restore(self, state: Mapping[str, Any], groups: Mapping[int, tuple[int, Group]]) -> None:
        """The opposite: groups are (version at which it was begun, samples)."""
        for name in ("position", "again", "dropped", "failed", "oversampled"):
            setattr(self, name, state[name])
        for group, (version, samples) in groups.items():
            self.begun[group], self.done[group] = version, samples
