"""Miles plugin: callbacks that watch and steer a trainer's steps."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    """The callbacks of this plugin."""
    yield CallbackSpec(
        name="nan-guard",
        ref="miles_callbacks.nan_guard:NanGuard",
        options="miles_callbacks.options:NanGuard",
        runs_on=frozenset({"driver", "trainer"}),
        summary="Skips optimizer steps that are not finite, and says which sample and which parameters",
    )
    yield CallbackSpec(
        name="aux-loss-probe",
        ref="miles_callbacks.aux_loss:AuxLossProbe",
        options="miles_callbacks.options:AuxLossProbe",
        runs_on=frozenset({"trainer"}),
        summary="Adds the z-loss of the logits to the objective, and reports it",
    )
