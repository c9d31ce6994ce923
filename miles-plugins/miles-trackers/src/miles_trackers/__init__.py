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
    yield TrackerSpec(
        name="tensorboard",
        extra="tensorboard",
        ref="miles_trackers.tensorboard:TensorBoard",
        options="miles_trackers.options:TensorBoard",
        summary="Metrics for TensorBoard.",
    )
    yield TrackerSpec(
        name="wandb",
        extra="wandb",
        ref="miles_trackers.wandb:WandB",
        options="miles_trackers.options:WandB",
        example="miles_trackers.examples:wandb",
        summary="Metrics to Weights & Biases, or into files for `wandb sync`.",
    )
    yield TrackerSpec(
        name="mlflow",
        extra="mlflow",
        ref="miles_trackers.mlflow:MLflow",
        options="miles_trackers.options:MLflow",
        example="miles_trackers.examples:mlflow",
        summary="Metrics and the run file to MLflow, a server or a database file.",
    )
