"""Miles plugin: the Qwen family of models."""

from collections.abc import Iterable

from miles_core import ModelSpec, hookimpl


@hookimpl
def miles_models() -> Iterable[ModelSpec]:
    """The families of this plugin."""
    yield ModelSpec(
        name="qwen2",
        ref="miles_qwen.family:Qwen2",
        architectures=("Qwen2ForCausalLM",),
        backends={"megatron": "miles_qwen.megatron:qwen2"},
        summary="Qwen2 and Qwen2.5, dense.",
    )
    yield ModelSpec(
        name="qwen3",
        ref="miles_qwen.family:Qwen3",
        architectures=("Qwen3ForCausalLM",),
        backends={"megatron": "miles_qwen.megatron:qwen3"},
        summary="Qwen3, dense.",
    )
    yield ModelSpec(
        name="qwen3-moe",
        ref="miles_qwen.family:Qwen3Moe",
        architectures=("Qwen3MoeForCausalLM",),
        backends={"megatron": "miles_qwen.megatron:qwen3_moe"},
        summary="Qwen3, mixture of experts.",
    )
