"""An engine that counts what it is asked for.

Its class stands in a module of its own, because that imports torch. What brings it weights is another record: see
`miles_weight_syncs`.
"""

from collections.abc import Iterable

from miles_core import EngineSpec, hookimpl


@hookimpl
def miles_engines() -> Iterable[EngineSpec]:
    yield EngineSpec(
        name="counted",
        ref="acme_counted_engine:CountedEngine",
        options="miles_torch.engine_options:EngineOptions",
        features=frozenset({"seeds"}),
        pause_modes=frozenset({"drain", "abort", "retract", "in-place"}),
        summary="The engine torch, which counts its requests in logs/requests-N.txt",
    )
