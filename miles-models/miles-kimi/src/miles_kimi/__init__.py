"""Miles plugin: the Kimi family of models."""

from collections.abc import Iterable

from miles_core import ModelSpec, hookimpl


@hookimpl
def miles_models() -> Iterable[ModelSpec]:
    """The families of this plugin."""
    yield ModelSpec(
        name="kimi-k2",
        ref="miles_kimi.family:KimiK2",
        architectures=("DeepseekV3ForCausalLM",),
        model_types=("kimi_k2",),
        backends={"megatron": "miles_kimi.backends:megatron", "transformers": "miles_kimi.backends:transformers"},
        example="miles_deepseek.family:example",
        summary="Kimi K2, text.",
    )
