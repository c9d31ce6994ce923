"""A teacher that is quickly learnt: what it finds likely does not depend on what comes before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RUN = """
[data]
name = "jsonl"
path = "data.jsonl"
[sampling]
max_new_tokens = 8
[engine]
name = "torch"
[teacher]
path = "teacher"
engine = "torch"
[trainer]
name = "torch"
[trainer.optimizer]
learning_rate = 2e-2
[schedule]
steps = 12
prompts_per_step = 8
samples_per_prompt = 4
[model]
family = "qwen3"
tokenizer = "ascii"
max_tokens = 40
[model.config]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
tie_word_embeddings = true
"""
"""A run file without a reward, an advantage and a loss."""


def save_teacher(folder: Path, tokenizer: str = "ascii", **changes: Any) -> Path:
    """A Hugging Face folder of a model with one layer, whose next token always has the same distribution."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from miles_core.run.tokenizers import make_tokenizer

    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "architectures": ["Qwen3ForCausalLM"],
        **make_tokenizer(tokenizer, folder),
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = AutoModelForCausalLM.from_config(Qwen3Config(**fields))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(1.0)
            model.lm_head.weight.normal_(std=2.0 * 32**-0.5)
    model.save_pretrained(folder)
    return folder
