from miles_core import families
from miles_llama.family import DEFAULTS, Llama

OWN = {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": None}
NOT_THERE = ("attention_bias", "mlp_bias", "pretraining_tp", "rope_scaling")
FIELDS = {key: value for key, value in {**DEFAULTS, **OWN}.items() if key not in NOT_THERE}


class Mistral:
    def fresh(self, config):
        """A complete config.json for a new model; ValueError for an unknown field."""
        full = families.complete(FIELDS, config)
        families.check_sizes(full)
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **full}

    def parameters(self, config) -> int:
        return Llama().parameters({**FIELDS, **config})
