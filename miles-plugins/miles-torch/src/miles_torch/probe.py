"""Whether a forward over the engine's cache gives the numbers of the model's own forward.

An architecture can be told by its numbers where its structure says too little: on random weights, before the real ones
come, two short sequences go through transformers' own forward, and through a cached one as a prefill and a step.

Shapes: T tokens; S = 2 sequences; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miles_torch import attention
from miles_torch.attention import Decode, KVCache, Prefill

Forward = Callable[[Tensor, Tensor, Prefill | Decode, Tensor | None], Tensor]
"""(tokens int64 [T], their places int64 [T], what they are, which to keep) -> logits [kept, V]; None keeps all."""

_LENGTHS = (11, 5)
TOKENS = max(_LENGTHS)
"""The longest sequence of a probe."""


def randomize(module: Any) -> None:
    """Weights that make every part of a model matter."""
    for parameter in module.parameters():
        generator = torch.Generator(parameter.device).manual_seed(parameter.numel())
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)


def by_transformers(module: Any) -> Tensor:
    """Logits after the last two tokens of each sequence [4, V], by transformers' own attention without a cache."""
    module.set_attn_implementation("eager")
    try:
        rows = [module(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0, -2:] for tokens in _sequences(module)]
    finally:
        module.set_attn_implementation(attention.NAME)
    return torch.cat(rows)


def by_cache(module: Any, forward: Forward) -> Tensor:
    """The same by `forward`: all but the last tokens as a prefill, then a step."""
    sequences = _sequences(module)
    device = sequences[0].device
    cache = KVCache()
    cache.reserve(len(_LENGTHS), TOKENS)
    first, second = (length - 1 for length in _LENGTHS)
    places = torch.cat([torch.arange(first), torch.arange(second)]).to(device)
    last = torch.tensor([first - 1, first + second - 1], device=device)
    prefill = Prefill(cache=cache, bounds=[0, first, first + second], rows=[0, 1])
    before = forward(torch.cat([tokens[:-1] for tokens in sequences]), places, prefill, last)
    ends = torch.tensor([first, second], device=device)
    after = forward(torch.stack([tokens[-1] for tokens in sequences]), ends, Decode(cache, ends, TOKENS), None)
    return torch.stack((before, after), dim=1).flatten(0, 1)


def agree(left: Tensor, right: Tensor) -> bool:
    """Whether logits are equal but for rounding."""
    tolerance = 1e-3 if left.dtype == torch.float32 else 0.1
    difference = (left.float() - right.float()).norm()
    return bool(difference <= tolerance * right.float().norm())


def _sequences(module: Any) -> list[Tensor]:
    """Two random sequences, the same ones each time."""
    weight = module.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(len(weight), (length,), generator=generator).to(weight.device) for length in _LENGTHS]
