"""The engine's copy of the policy: a transformers model whose weights are published and whose cache is static.

Shapes: T packed tokens of several sequences; S sequences; B rows; V vocabulary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.logging import disable_progress_bar

from miles_core.errors import UserError, nearest
from miles_torch import attention, probe
from miles_torch.attention import Decode, Prefill
from miles_torch.fused import FusedDecoder, fits
from miles_torch.model import config_of, pretrained

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_UNFIT = "the engine 'torch' cannot generate with {}: {}. Choose another engine, or another model."
_NO_INTERFACE = "its layers do not all call the attention interface of transformers"


class EngineModel:
    """A causal language model on one device that computes logits over a static cache.

    folder: a Hugging Face folder; its config.json alone is read at first. vocabulary: rows of the embedding.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, max_tokens: int) -> None:
        config = config_of(folder)
        _check_length(config, max_tokens)
        self.module: Any = _build(config, device, dtype)
        self.module.eval().requires_grad_(requires_grad=False)
        self.device = device
        self.vocabulary = len(self.module.get_input_embeddings().weight)
        self._max_tokens = max_tokens
        self._forward: probe.Forward = self._own
        _check_structure(self.module)
        with torch.inference_mode():
            self._fuses = self._check_numbers()
        self._layers = int(getattr(config, "num_hidden_layers", 0))
        self._places, self._parts = _places(self.module)
        self._missing = set().union(*self._parts.values())

    def _check_numbers(self) -> bool:
        """Refuses a model whose numbers do not come out right over the cache; says whether the fused forward's do.

        In bfloat16 a deep model with random weights is too noisy for a refusal.
        """
        probe.randomize(self.module)
        expected = probe.by_transformers(self.module)
        try:
            right = probe.agree(probe.by_cache(self.module, self._own), expected)
        except Exception as error:
            raise _unfit(self.module, f"its forward fails with the engine's attention ({error})") from error
        if not right and expected.dtype == torch.float32:
            raise _unfit(self.module, "over a cache of keys and values it gives other numbers than without")
        if self.device.type != "cpu" or not fits(self.module):  # the fused forward is the CPU's alone
            return False
        return probe.agree(probe.by_cache(self.module, FusedDecoder(self.module, probe.TOKENS)), expected)

    def load(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Copies tensors into the weights of the same names, this model's or those in files; `UserError` for an unknown
        name or another shape. Layers after the last, which predict further tokens, are left out."""
        with torch.no_grad():
            for name, tensor in zip(names, tensors, strict=True):
                place = self._places.get(name)
                if place is None and (layer := _LAYER.match(name)) and int(layer[1]) >= self._layers:
                    continue
                if place is None:
                    raise UserError(f"the engine's model has no tensor {name!r}. {nearest(name, self._places)}")
                if place.shape != tensor.shape:
                    raise UserError(
                        f"tensor {name!r} has shape {list(tensor.shape)}; the engine's model has {list(place.shape)}"
                    )
                place.copy_(tensor)
                self._missing -= self._parts[name]

    def load_pretrained(self, folder: Path) -> None:
        """Takes over the weights of a Hugging Face folder. `UserError` if there are none, or not all of the model."""
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} has no weights (*.safetensors), so there is nothing to score with.")
        disable_progress_bar()  # type: ignore[no-untyped-call]
        dtype = next(self.module.parameters()).dtype
        tensors = pretrained(folder, config_of(folder), dtype).state_dict()
        self.load(list(tensors), list(tensors.values()))
        self.finish_load()

    def finish_load(self) -> None:
        """All weights of a version should be here, tied ones under any of their names; `UserError` otherwise."""
        missing = sorted(self._missing)
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise UserError(f"{len(missing)} tensors of the engine's model were not among the weights: {shown}")
        self._missing = set().union(*self._parts.values())
        if self._fuses:
            with torch.inference_mode():
                self._forward = FusedDecoder(self.module, self._max_tokens)

    def sleep(self) -> None:
        """Moves the weights out of an accelerator's memory."""
        self._move(torch.device("cpu"))

    def wake(self) -> None:
        """Moves the weights back."""
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self.device.type != "cpu":
            self.module.to(device)
            self._places, self._parts = _places(self.module)

    def prefill(self, tokens: Tensor, step: Prefill, keep: Tensor | None = None) -> Tensor:
        """Computes whole sequences packed end to end, int64 [T].

        Logits after the tokens at the places `keep`, int64 [K], [K, V]; after the last token of each sequence, [S, V],
        if None.
        """
        lengths = [end - start for start, end in pairwise(step.bounds)]
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        if keep is None:
            keep = torch.tensor(step.bounds[1:], device=self.device) - 1
        return self._forward(tokens, positions, step, keep)

    def decode(self, tokens: Tensor, step: Decode) -> Tensor:
        """One more token for each of the first B rows, int64 [B]; logits [B, V] after it."""
        return self._forward(tokens, step.positions, step, None)

    def _own(self, tokens: Tensor, positions: Tensor, step: Prefill | Decode, keep: Tensor | None) -> Tensor:
        """By the model's own forward, which any architecture has."""
        shape = (1, -1) if isinstance(step, Prefill) else (-1, 1)
        with attention.attending(step):
            output = self.module(
                input_ids=tokens.view(shape),
                position_ids=positions.view(shape),
                use_cache=False,
                logits_to_keep=0 if keep is None else keep,
            )
        logits: Tensor = output.logits
        return logits.flatten(0, 1)


def _places(module: Any) -> tuple[dict[str, Tensor], dict[str, frozenset[str]]]:
    """Where each tensor goes, and the parts of the model that it fills.

    By the names of this model and by those in files: transformers holds all experts of a layer as one tensor, and files
    hold them one by one. A part is called by the first name in files of what lies at its place.
    """
    own: dict[str, Tensor] = module.state_dict(keep_vars=True)
    storages = {_storage(tensor) for tensor in own.values()}
    files = {
        name: tensor
        for name, tensor in revert_weight_conversion(module, dict(own)).items()
        if _storage(tensor) in storages
    }
    order = {name: number for number, name in enumerate(own)}
    first: dict[tuple[int, int], str] = {}
    parts: dict[str, frozenset[str]] = {}
    together: dict[int, set[str]] = {}
    for name in sorted(files, key=lambda name: order.get(name, len(own))):
        storage = _storage(files[name])
        part = first.setdefault((storage, int(files[name].storage_offset())), name)
        parts[name] = frozenset({part})
        together.setdefault(storage, set()).add(part)
    for name, tensor in own.items():
        parts[name] = frozenset(together[_storage(tensor)])
    return {**files, **own}, parts


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention.NAME
            )
    except KeyError as error:  # looks its attention up in a table of its own
        if error.args != (attention.NAME,):
            raise
        raise UserError(_UNFIT.format(config.model_type, _NO_INTERFACE)) from error


def _check_length(config: Any, max_tokens: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max_tokens > longest:
        raise UserError(
            f"model.max_tokens is {max_tokens}, but the model has only {longest} positions "
            "(max_position_embeddings in its config.json). Lower model.max_tokens."
        )


def _check_structure(module: Any) -> None:
    kinds = sorted(set(getattr(module.config, "layer_types", None) or ()) - _LAYER_TYPES)
    if kinds:
        raise _unfit(module, f"it has layers of type {', '.join(kinds)}")
    parameters = inspect.signature(module.forward).parameters
    if not module._supports_attention_backend or not {"position_ids", "logits_to_keep"} <= set(parameters):
        raise _unfit(module, _NO_INTERFACE)


def _unfit(module: Any, why: str) -> UserError:
    return UserError(_UNFIT.format(type(module).__name__, why))
