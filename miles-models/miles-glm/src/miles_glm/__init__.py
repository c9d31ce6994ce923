"""Miles plugin: the GLM family of models."""

from collections.abc import Iterable

from miles_core import ModelSpec, hookimpl


@hookimpl
def miles_models() -> Iterable[ModelSpec]:
    """The families of this plugin."""
    yield ModelSpec(
        name="glm4-moe",
        ref="miles_glm.family:Glm4Moe",
        architectures=("Glm4MoeForCausalLM",),
        backends={"megatron": "miles_glm.megatron:glm4_moe"},
        example="miles_glm.family:example",
        summary="GLM-4.5, 4.6 and 4.7, mixture of experts.",
    )
