"""The loop. There is one; `max_staleness` is the only difference between synchronous and asynchronous.

`run` is a `miles_core.run.driver.Run`: the parts of a run, each in processes of its own. A batch is a reference; its
bytes go from the collector to the trainer and never through the driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles_core.run.driver import Run


async def train(run: Run) -> None:
    """Trains until the last step of the last stage. Runs in the driver."""
    async for batch in run.batches():  # waits only while the oldest sample would exceed max_staleness
        batch = await run.reference(batch)  # the trainer's columns: old and reference log-probabilities, values
        batch = await run.advantage(batch)  # advantages, and the loss aggregation as weights
        report = await run.update(batch)
        await run.publish(report.version)
        await run.step_end(report)  # trackers and callbacks, evaluation, checkpoint
