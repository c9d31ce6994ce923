"""Miles plugin: a model family with a gate after attention and a router that compares directions."""

from collections.abc import Iterable

from miles_core import ModelSpec, hookimpl


@hookimpl
def miles_models() -> Iterable[ModelSpec]:
    """The family of this plugin."""
    yield ModelSpec(
        name="acme-gated-moe",
        ref="acme_gated_moe.family:GatedMoe",
        architectures=("AcmeGatedMoeForCausalLM",),
        backends={
            "megatron": "acme_gated_moe.backends:megatron",
            "transformers": "acme_gated_moe.backends:transformers",
        },
        example="acme_gated_moe.family:example",
        summary="Qwen3's mixture of experts with gated attention and a router by directions.",
    )
