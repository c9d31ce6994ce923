"""A model family: Mistral has the shape of Llama, so it borrows what Llama's plugin knows."""

from collections.abc import Iterable

from miles_core import ModelSpec, hookimpl


@hookimpl
def miles_models() -> Iterable[ModelSpec]:
    yield ModelSpec(
        name="acme-mistral",
        ref="acme_mistral_family:Mistral",
        architectures=("MistralForCausalLM",),
        summary="Mistral, dense, without a sliding window",
    )
