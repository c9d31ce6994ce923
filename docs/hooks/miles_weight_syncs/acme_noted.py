"""How weights go from the trainer `averaged` to the engine `counted`, the examples above.

`trainer` and `engine` name the pair; a run finds its weight sync by them.
"""

from collections.abc import Iterable

from miles_core import WeightSyncSpec, hookimpl


@hookimpl
def miles_weight_syncs() -> Iterable[WeightSyncSpec]:
    yield WeightSyncSpec(
        name="averaged-to-counted",
        trainer="averaged",
        engine="counted",
        ref="acme_noted_sync:NotingSender",
        receiver="miles_torch.sync:TorchReceiver",
        summary="Over a process group, as miles-torch does it; the trainer's log says how much went",
    )
