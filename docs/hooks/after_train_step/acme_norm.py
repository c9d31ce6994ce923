"""Reports the norm of the weights with every step's metrics."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="weight-norm",
        ref="acme_norm:Norm",
        runs_on=frozenset({"trainer"}),
        summary="The metric weight_norm: how large the weights are",
    )


class Norm:
    def __init__(self, options: None) -> None: ...

    def after_train_step(self, model, metrics) -> None:
        metrics["weight_norm"] = sum(float(weight.detach().square().sum()) for weight in model.parameters()) ** 0.5
