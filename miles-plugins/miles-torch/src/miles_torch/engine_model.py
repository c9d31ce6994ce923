"""The engine's copy of the policy: a transformers model whose weights are published and whose cache is static.

Shapes: T packed tokens of several sequences; S sequences; B rows; V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from miles_core.errors import UserError, nearest
from miles_torch import attention
from miles_torch.attention import Decode, KVCache, Prefill
from miles_torch.fused import FusedDecoder, fits

_PROBE = 16
"""Tokens in the comparison of the two forwards."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}


class EngineModel:
    """A causal language model on one device that computes logits over a static cache.

    folder: a Hugging Face folder; only its config.json is read. vocabulary: rows of the embedding.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, max_tokens: int) -> None:
        config = AutoConfig.from_pretrained(folder)
        _check_length(config, max_tokens)
        with torch.device(device):
            self.module: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention.NAME
            )
        _check_supported(self.module)
        self.module.eval().requires_grad_(requires_grad=False)
        self.device = device
        self.vocabulary = int(self.module.get_input_embeddings().weight.shape[0])
        self._max_tokens = max_tokens
        self._fused: FusedDecoder | None = None
        with torch.inference_mode():
            self._fuses = device.type == "cpu" and fits(self.module) and self._agrees()
        self._places: dict[str, Tensor] = self.module.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        self._names = {name: first.setdefault(id(tensor), name) for name, tensor in self._places.items()}
        self._missing = set(first.values())

    def load(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Copies tensors into the weights of the same names; `UserError` for an unknown name or another shape."""
        with torch.no_grad():
            for name, tensor in zip(names, tensors, strict=True):
                place = self._places.get(name)
                if place is None:
                    raise UserError(f"the engine's model has no tensor {name!r}. {nearest(name, self._places)}")
                if place.shape != tensor.shape:
                    raise UserError(
                        f"tensor {name!r} has shape {list(tensor.shape)}; the engine's model has {list(place.shape)}"
                    )
                place.copy_(tensor)
                self._missing.discard(self._names[name])

    def finish_load(self) -> None:
        """All weights of a version should be here, tied ones under any of their names; `UserError` otherwise."""
        missing = sorted(self._missing)
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise UserError(f"{len(missing)} tensors of the engine's model were not among the weights: {shown}")
        self._missing = set(self._names.values())
        if self._fuses:
            with torch.inference_mode():
                self._fused = FusedDecoder(self.module, self._max_tokens)

    def sleep(self) -> None:
        """Moves the weights out of an accelerator's memory."""
        self._move(torch.device("cpu"))

    def wake(self) -> None:
        """Moves the weights back."""
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self.device.type != "cpu":
            self.module.to(device)
            self._places = self.module.state_dict(keep_vars=True)

    def prefill(self, tokens: Tensor, step: Prefill) -> Tensor:
        """Computes whole sequences packed end to end, int64 [T]; logits [S, V] after the last token of each."""
        lengths = [end - start for start, end in pairwise(step.bounds)]
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        last = torch.tensor(step.bounds[1:], device=self.device) - 1
        if self._fused is not None:
            return self._fused(tokens, positions, step, last)
        return self._logits(tokens.unsqueeze(0), positions.unsqueeze(0), step, last).squeeze(0)

    def decode(self, tokens: Tensor, step: Decode) -> Tensor:
        """One more token for each of the first B rows, int64 [B]; logits [B, V] after it."""
        if self._fused is not None:
            return self._fused(tokens, step.positions, step, None)
        return self._logits(tokens.unsqueeze(1), step.positions.unsqueeze(1), step, 0).squeeze(1)

    def _logits(self, tokens: Tensor, positions: Tensor, step: Prefill | Decode, keep: Tensor | int) -> Tensor:
        """By the model's own forward."""
        with attention.attending(step):
            output = self.module(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=keep)
        logits: Tensor = output.logits
        return logits

    def _agrees(self) -> bool:
        """Whether the fused forward gives the model's own numbers, on random weights (real ones come later)."""
        generator = torch.Generator().manual_seed(0)
        for parameter in self.module.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        fused, results = FusedDecoder(self.module, _PROBE), []
        for self._fused in (None, fused):
            cache = KVCache()
            cache.reserve(2, _PROBE)
            tokens = torch.randint(self.vocabulary, (_PROBE,), generator=torch.Generator().manual_seed(1))
            first = self.prefill(tokens[:-2], Prefill(cache, [0, _PROBE - 6, _PROBE - 2], [0, 1]))
            places = torch.tensor([_PROBE - 6, 4])
            results.append(torch.cat((first, self.decode(tokens[-2:], Decode(cache, places, _PROBE - 5)))).float())
        self._fused = None
        own, lean = results
        tolerance = 1e-3 if self.module.dtype == torch.float32 else 5e-2
        return bool((own - lean).abs().max() <= tolerance * own.abs().max())


def _check_length(config: Any, max_tokens: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max_tokens > longest:
        raise UserError(
            f"model.max_tokens is {max_tokens}, but the model has only {longest} positions "
            "(max_position_embeddings in its config.json). Lower model.max_tokens."
        )


def _check_supported(module: Any) -> None:
    name = type(module).__name__
    kinds = set(getattr(module.config, "layer_types", None) or ()) - _LAYER_TYPES
    parameters = inspect.signature(module.forward).parameters
    if not module._supports_attention_backend or kinds or not {"position_ids", "logits_to_keep"} <= set(parameters):
        why = f" (layers of type {', '.join(sorted(kinds))})" if kinds else ""
        raise UserError(
            f"the engine 'torch' cannot generate with {name}{why}: it needs a decoder whose layers all call the "
            "attention interface of transformers. Choose another engine, or another model."
        )
