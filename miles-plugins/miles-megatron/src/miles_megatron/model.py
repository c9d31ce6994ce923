"""The ranks' division, the model of a rank, and its parameters by the names that mapping tables use.

A rank holds one or more chunks of the model (more than one with a virtual pipeline), each a `GPTModel`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from miles_core.errors import UserError
from miles_core.megatron import MegatronModel
from miles_megatron import layers, router
from miles_megatron.layout import Layout

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of it, so that checkpoints of different tensor-parallel sizes agree."""


def divide_ranks(layout: Layout, seed: int, timeout_s: float) -> None:
    """Makes Megatron's process groups over the default one, and its random states."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def padded_vocabulary(size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding, padding included."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor_parallel_size)
    return -(-size // multiple) * multiple


VALUE_HEAD = "score.weight"
"""Name of the head of a critic, as in transformers' token classifiers and in the critic of the trainer `torch`."""


def build(config: Any, model: MegatronModel, device: torch.device, value_seed: int | None = None) -> list[nn.Module]:
    """The chunks of this rank, their parameters uninitialised, in evaluation mode. Raises `UserError`.

    value_seed: of a critic's head; None for a policy.
    """
    stages = config.virtual_pipeline_model_parallel_size
    numbers: list[int | None] = [None] if stages is None else list(range(stages))
    try:
        with _fusion(config) as fuse:
            chunks = [fuse(_chunk(config, model, number, value_seed).to(device)) for number in numbers]
        router.check(chunks, config)
    except UserError:
        raise
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise UserError(f"Megatron-core cannot build this model with these options: {error}") from error
    return [Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks]


@contextmanager
def _fusion(config: Any) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Lets Transformer Engine add gradients of weights to the buffers as it computes them, if that is asked for.

    Megatron's own output layer would need Apex for it and refuse to be built, though it is never called here.
    """
    asked = config.gradient_accumulation_fusion and config.transformer_impl == "transformer_engine"

    def fuse(chunk: nn.Module) -> nn.Module:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
        return chunk

    config.gradient_accumulation_fusion = config.gradient_accumulation_fusion and not asked
    try:
        yield fuse if asked else lambda chunk: chunk
    finally:
        config.gradient_accumulation_fusion = config.gradient_accumulation_fusion or asked


class Model(GPTModel):  # type: ignore[misc]
    """Megatron's model, whose `output_processor` also gets, as `further`, the states that predict further tokens.

    Megatron's own way computes their loss itself, with logits of its own and weights that depend on micro-batches.
    Without gradients nothing further is computed.
    """

    def _postprocess(self, hidden_states: Tensor, output_processor: Any = None, **given: Any) -> Any:
        if not given["mtp_in_postprocess"]:
            return super()._postprocess(hidden_states, output_processor=output_processor, **given)
        states = (hidden_states,)
        if torch.is_grad_enabled():
            passed = ("input_ids", "position_ids", "attention_mask", "padding_mask", "packed_seq_params")
            rotary = ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "sequence_len_offset")
            predicted = self.mtp(
                hidden_states=hidden_states,
                embedding=self.embedding,
                **{name: given[name] for name in (*passed, *rotary)},
            )
            states = predicted.chunk(1 + self.config.mtp_num_layers)
        tied = self.share_embeddings_and_output_weights
        return output_processor(
            hidden_states=states[0],
            further=states[1:],
            output_layer=self.output_layer,
            output_weight=self.shared_embedding_or_output_weight() if tied else None,
            context=given["output_processor_context"],
            config=self.config,
        )


class ValueModel(GPTModel):  # type: ignore[misc]
    """Megatron's model for a critic: on the last stage `output_processor` gets a head of one output instead of the
    vocabulary's.

    The head is whole on every tensor-parallel rank. seed: of its weight, which is drawn from a normal distribution of
    deviation 1 / (hidden size + 1), as in Stiennon et al., Learning to summarize from human feedback, arXiv 2009.01325.
    """

    def __init__(self, *, seed: int, **given: Any) -> None:
        super().__init__(**given)
        if not self.post_process:
            return
        del self.output_layer
        width = self.config.hidden_size
        self.score = nn.utils.skip_init(nn.Linear, width, 1, bias=False)  # type: ignore[no-untyped-call]
        nn.init.normal_(self.score.weight, std=1 / (width + 1), generator=torch.Generator().manual_seed(seed))

    def _postprocess(self, hidden_states: Tensor, output_processor: Any = None, **given: Any) -> Any:
        if not self.post_process:
            return hidden_states
        context = given["output_processor_context"]
        return output_processor(
            hidden_states=hidden_states,
            output_layer=self.score,
            output_weight=None,
            context=context,
            config=self.config,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Mapping[str, Any] | None = None
    ) -> Any:
        """Without what Megatron's language models do for a vocabulary's head."""
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)


def _chunk(config: Any, model: MegatronModel, stage: int | None, value_seed: int | None) -> nn.Module:
    where = {"ignore_virtual": False, "vp_stage": stage}
    arguments = dict(model.gpt)
    size = padded_vocabulary(arguments.pop("vocab_size"), config.tensor_model_parallel_size)
    block = layers.block(config, model, stage)
    if value_seed is not None:
        arguments["seed"] = value_seed
    chunk: nn.Module = (Model if value_seed is None else ValueModel)(
        config=config,
        transformer_layer_spec=block,
        mtp_block_spec=layers.predictions(config, block, stage),
        vocab_size=size,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        parallel_output=True,
        vp_stage=stage,
        **arguments,
    )
    return chunk


def bare(module: Any) -> Any:
    """The `GPTModel` inside what wraps it."""
    while hasattr(module, "module"):
        module = module.module
    return module


@dataclass(frozen=True)
class Local:
    """A parameter of this rank, or a buffer that is part of the model.

    name: as in mapping tables. tensor: this rank's part. dim: along which it is divided, None if it is whole.
    expert: it belongs to the experts, which have groups of their own. copied: it is the last stage's copy of the
    embedding, which is the output layer, or which layers that predict further tokens read.
    """

    name: str
    tensor: Tensor
    dim: int | None
    expert: bool
    copied: bool = False

    @property
    def new(self) -> bool:
        """Whether no folder holds it: it is a critic's head."""
        return self.name == VALUE_HEAD

    @property
    def group(self) -> Any:
        """Over whose ranks it is divided."""
        if self.expert:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def replica(self) -> int:
        """0 on one of the ranks that hold the same part."""
        if self.expert:
            rank: int = parallel_state.get_expert_data_parallel_rank()
        else:
            rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        shape = list(self.tensor.shape)
        if self.dim is not None:
            shape[self.dim] *= self.group.size()
        return tuple(shape)


_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.(weight|bias)$")
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc\d)\.(weight|bias)(\d+)$")


def parameters(chunks: list[nn.Module]) -> Iterator[Local]:
    """All of this rank, in the order of the model."""
    for chunk in map(bare, chunks):
        copies = () if chunk.pre_process else ("embedding.word_embeddings.weight",)
        if chunk.share_embeddings_and_output_weights:
            copies = (*copies, "output_layer.weight")
        for name, tensor in _tensors(chunk):
            dim = getattr(tensor, "partition_dim", -1) if getattr(tensor, "tensor_model_parallel", False) else -1
            expert = ".experts." in name and ".shared_experts." not in name
            yield Local(
                name=_global_name(chunk, name),
                tensor=tensor,
                dim=dim if dim >= 0 else None,
                expert=expert,
                copied=name in copies,
            )


def _tensors(chunk: Any) -> Iterator[tuple[str, Tensor]]:
    yield from chunk.named_parameters()
    for name, buffer in chunk.named_buffers():
        if name.endswith("router.expert_bias"):
            yield name, buffer


def _global_name(chunk: Any, name: str) -> str:
    """With layers and experts counted over the whole model, and experts named as in a grouped module."""
    if found := _LAYER.match(name):
        number = chunk.decoder.layers[int(found[1])].layer_number - 1
        name = f"decoder.layers.{number}.{name[found.end() :]}"
    if chunk.config.multi_latent_attention:
        for apart, fused in layers.LATENT_NORMS.items():
            name = name.replace(apart, fused)
    if found := _LOCAL_EXPERT.search(name):
        return f"{name[: found.start()]}.experts.{found[2]}.{found[3]}{_expert(chunk, int(found[1]))}"
    if found := _GROUPED_EXPERT.search(name):
        return f"{name[: found.start()]}.experts.{found[1]}.{found[2]}{_expert(chunk, int(found[3]))}"
    return name


def _expert(chunk: Any, local: int) -> int:
    size: int = parallel_state.get_expert_model_parallel_world_size()
    own: int = chunk.config.num_moe_experts // size
    return int(parallel_state.get_expert_model_parallel_rank()) * own + local
