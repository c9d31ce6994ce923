"""Miles plugin: trackers, where metrics go."""

from collections.abc import Iterable

from miles_core import TrackerSpec, hookimpl


@hookimpl
def miles_trackers() -> Iterable[TrackerSpec]:
    """The trackers of this plugin."""
    yield TrackerSpec(
        name="curves",
        ref="miles_trackers.curves:Curves",
        options="miles_trackers.options:Curves",
        summary="A picture of the run's curves, curves.png in its folder.",
    )
