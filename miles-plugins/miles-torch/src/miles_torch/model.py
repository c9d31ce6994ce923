"""The policy: a transformers causal language model that gives log-probabilities of packed samples.

Shapes: N tokens of a packed row; T trained tokens; V vocabulary; D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.logging import disable_progress_bar

from miles_core.config.model import family_of
from miles_core.errors import UserError
from miles_core.plugins import discover, resolve
from miles_core.run.weight_files import some
from miles_core.sample import Batch
from miles_torch import attention_packed
from miles_torch.fused_training import FusedTraining
from miles_torch.logprobs import token_logprobs
from miles_torch.packing import Packed, plan

LOGITS_LIMIT = 2**28
"""Most elements of logits that exist at once (1 GiB in float32). Past it they are made in chunks, twice."""

_logger = logging.getLogger(__name__)


def config_of(path: Path | str) -> Any:
    """transformers' configuration of a Hugging Face folder or hub name; as its family says, if an installed one
    describes it for transformers, which then does not know its model type."""
    said, _ = PreTrainedConfig.get_config_dict(str(path))
    family = family_of(said, discover())
    if family is not None and "transformers" in family.spec.backends:
        return resolve(family.spec.backends["transformers"])(said)
    return AutoConfig.from_pretrained(str(path))


def load(path: Path, seed: int) -> Any:
    """The causal language model of a Hugging Face folder (or hub name), in float32 on the CPU, in evaluation mode.

    A folder without weights gives random ones made from `seed`, the same on every rank. Evaluation mode stays: with
    dropout, old and new log-probabilities of the same weights would differ.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    config = config_of(path)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        if any(path.glob("*.bin")):
            raise UserError(f"{path} holds pickled weights (*.bin); convert them to safetensors first.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    else:
        model = pretrained(path, config, torch.float32)
    return model.eval()


def pretrained(path: Path, config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of a Hugging Face folder (or hub name) with its weights.

    Raises `UserError` if one is not there, or in another shape: transformers would draw it at random.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(path),
        config=config,
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{path} lacks {some(missing)}, which the model's config.json asks for")
    for name, shape, wanted in sorted(found["mismatched_keys"]):
        raise UserError(
            f"{path}: {name} has shape {tuple(shape)}, but the model's config.json makes it {tuple(wanted)}"
        )
    return model


def layers(model: Any) -> list[nn.Module]:
    """The decoder layers: the units of sharding and of activation checkpointing."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def checkpoint_activations(model: Any) -> None:
    """Makes each layer keep only its input and compute the rest again in the backward pass."""
    for layer in layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their Hugging Face names, tied ones once, under the first name."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


@dataclass(frozen=True)
class MicroBatch:
    """A `Packed` on the device. tokens, positions: int64 [1, N]; sources, targets, segments: int64 [T]."""

    packed: Packed
    tokens: Tensor
    positions: Tensor
    sources: Tensor
    targets: Tensor
    segments: Tensor
    layout: attention_packed.Layout

    @classmethod
    def build(cls, packed: Packed, device: torch.device, *, ragged: bool = False) -> MicroBatch:
        """Copies the indices to the device, once. ragged: for `attention_packed.Ragged`."""

        def move(index: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
            return torch.from_numpy(index).to(device)

        return cls(
            packed=packed,
            tokens=move(packed.tokens)[None],
            positions=move(packed.positions)[None],
            sources=move(packed.sources),
            targets=move(packed.targets),
            segments=move(packed.segments),
            layout=(attention_packed.ragged if ragged else attention_packed.padded)(packed.trees, device),
        )


class _Given(nn.Module):
    """Stands in for a model's body and returns what is already there."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output


class Policy(nn.Module):
    """A causal language model that is called with a micro-batch. model: the transformers model.

    packed: samples run end to end in one row and share their prompts, which needs plain causal attention through
    transformers' attention interface; otherwise they run as rows padded at the end, which any causal model can do.
    On a CPU, common models run packed by a lean forward. Which of them gives the right numbers is found out by trying.
    Raises `UserError` if none does.
    dtype: what it computes in from float32 parameters, unless sharding sees to that.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.dtype = torch.float32
        native = model.config._attn_implementation
        self.packed = True
        self._fused = FusedTraining.of(model)
        if self._fused is not None and self._try(native) is None:
            return
        self._fused = None
        refusal = self._try(native)
        if refusal is None:
            return
        self.packed = False
        worse = self._try(native)
        if worse is not None:
            raise UserError(f"trainer torch cannot train {type(model).__name__}: {worse}.")
        _logger.warning("%s runs padded, not packed: %s", type(model).__name__, refusal)

    def forward(
        self, micro: MicroBatch, temperature: float = 1.0, entropy: bool = False, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the trained tokens and, if asked for, entropies, float32 [T].

        targets: int64 [T, M], tokens to ask for in the place of each trained one; log-probabilities are then [T, M].
        """
        wanted = micro.targets if targets is None else targets
        hidden, kind = self._packed(micro) if self.packed else self._padded(micro)
        head = partial(self._head, kind, temperature, entropy)
        rows = max(1, LOGITS_LIMIT // self.model.config.get_text_config().vocab_size)
        if len(hidden) <= rows:
            return head(hidden, wanted)
        parts = [
            checkpoint(head, part, tokens, use_reentrant=False)
            for part, tokens in zip(torch.split(hidden, rows), torch.split(wanted, rows), strict=True)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]) if entropy else None

    @property
    def lean(self) -> bool:
        """Whether the next forward is the lean one; a model that is hooked into or changed runs by its own modules."""
        return self._fused is not None and self._fused.untouched()

    def compute_in(self, dtype: torch.dtype) -> None:
        """From float32 parameters, without sharding."""
        self.dtype = dtype
        if self._fused is not None:
            self._fused.dtype = dtype

    def _packed(self, micro: MicroBatch) -> tuple[Tensor, type]:
        """Hidden states that predict the trained tokens, [T, D], and the type of the body's output."""
        if self._fused is not None and self.lean:
            assert isinstance(micro.layout, attention_packed.Padded)
            return self._fused(
                micro.tokens[0], micro.positions[0], micro.layout, micro.sources
            ), BaseModelOutputWithPast
        output = self._call(
            self.model.base_model,
            input_ids=micro.tokens,
            position_ids=micro.positions,
            use_cache=False,
            packed_layout=micro.layout,
        )
        return output.last_hidden_state[0, micro.sources], type(output)

    def _padded(self, micro: MicroBatch) -> tuple[Tensor, type]:
        """The same from rows padded at the end; as the model is causal, the padding needs no mask."""
        assert isinstance(micro.layout, attention_packed.Padded)
        outputs = [
            self._call(self.model.base_model, input_ids=micro.tokens[0, block.queries]) for block in micro.layout.blocks
        ]
        hidden = torch.cat([output.last_hidden_state.flatten(0, 1) for output in outputs])
        return hidden[micro.layout.scatter[micro.sources]], type(outputs[0])

    def _head(
        self, kind: type, temperature: float, entropy: bool, hidden: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """From hidden states [T, D]. The model's own forward makes the logits, so soft caps and scales stay right."""
        with self._body(_Given(kind(last_hidden_state=hidden[None]))):
            logits = self._call(self.model, inputs_embeds=hidden[None], use_cache=False).logits[0]
        return token_logprobs(logits, targets, temperature=temperature, entropy=entropy)

    def _call(self, module: nn.Module, **arguments: Any) -> Any:
        """A module's own forward, in the type that is computed in."""
        if self.dtype == torch.float32:
            return module(**arguments)
        cast = {name: parameter.to(self.dtype) for name, parameter in module.named_parameters()}
        return functional_call(module, cast, kwargs=arguments)

    @contextmanager
    def _body(self, stand_in: nn.Module) -> Iterator[None]:
        name = self.model.base_model_prefix
        body = self.model._modules[name]
        self.model._modules[name] = stand_in
        try:
            yield
        finally:
            self.model._modules[name] = body

    def _try(self, native: str) -> str | None:
        """Why the model cannot run like this. Two short samples with one prompt run together and alone."""
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if self.packed and kinds:  # a window would not show in short samples
            return f"it has layers of the kind {', '.join(sorted(kinds))}"
        batch = _probe(config.vocab_size)
        planned = plan(batch, range(len(batch)), budget=2**20, share=self.packed)
        micro = MicroBatch.build(planned[0][0], torch.device("cpu"))
        with torch.no_grad():
            self.model.set_attn_implementation(native)
            alone = torch.cat([self._alone(batch, sample) for sample in range(len(batch))])
            self.model.set_attn_implementation(attention_packed.NAME if self.packed else native)
            try:
                together = self(micro)[0]
            except Exception as error:  # whatever the model's own code raises
                return f"{type(error).__name__}: {error}"
        if torch.allclose(together, alone, rtol=1e-3, atol=1e-3):
            return None
        return "its log-probabilities differ from those of each sample alone"

    def _alone(self, batch: Batch, sample: int) -> Tensor:
        place = slice(batch.cu_seqlens[sample], batch.cu_seqlens[sample + 1])
        tokens = torch.from_numpy(batch["tokens"][place]).long()
        mask = torch.from_numpy(batch["mask"][place])
        logprobs = self.model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        chosen: Tensor = logprobs.gather(1, tokens[1:, None])[mask[1:], 0]
        return chosen


def _probe(vocabulary: int) -> Batch:
    """Two samples with one prompt of three tokens and responses of three and two."""
    tokens = np.array([1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8], dtype=np.int32) % vocabulary
    mask = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1], dtype=np.bool_)
    return Batch(
        cu_seqlens=np.array([0, 6, 11]),
        columns={"tokens": tokens, "mask": mask},
        samples={"prompt_length": np.array([3, 3])},
    )
