"""Miles plugin: the Llama family of models."""

from collections.abc import Iterable

from miles_core import ModelSpec, hookimpl


@hookimpl
def miles_models() -> Iterable[ModelSpec]:
    """The families of this plugin."""
    yield ModelSpec(
        name="llama",
        ref="miles_llama.family:Llama",
        architectures=("LlamaForCausalLM",),
        backends={"megatron": "miles_llama.megatron:llama"},
        summary="Llama 2 and 3, and the many models of the same shape.",
    )
