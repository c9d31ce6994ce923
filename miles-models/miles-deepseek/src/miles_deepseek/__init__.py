"""Miles plugin: the DeepSeek family of models."""

from collections.abc import Iterable

from miles_core import ModelSpec, hookimpl


@hookimpl
def miles_models() -> Iterable[ModelSpec]:
    """The families of this plugin."""
    yield ModelSpec(
        name="deepseek-v3",
        ref="miles_deepseek.family:DeepseekV3",
        architectures=("DeepseekV3ForCausalLM",),
        backends={"megatron": "miles_deepseek.megatron:deepseek_v3"},
        example="miles_deepseek.family:example",
        summary="DeepSeek V3 and R1, and models of the same shape.",
    )
