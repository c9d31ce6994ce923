"""Forward and backward passes of a mini-batch, as Megatron's schedules run them.

The objective is exactly sum(weights * losses) over all trained tokens. Gradients are summed over micro-batches and over
data- and context-parallel ranks, and never averaged: with `calculate_per_token_loss` Megatron leaves them as they are,
and its division by a number of tokens is left out.

Shapes: T trained tokens of a micro-batch on one context-parallel rank; S its samples; K the teacher's likeliest tokens
at each place; N tokens of a rank's row; H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from torch.nn import functional as F

from miles_core.filler import filler
from miles_core.sample import Batch
from miles_megatron import router
from miles_megatron.head import token_logprobs
from miles_megatron.packing import Cut, MicroBatch, Row, row
from miles_megatron.router import Counted


@dataclass(frozen=True)
class Task:
    """A micro-batch on this rank. segments: int64 [T], the sample of each token; samples: S.

    targets: int64 [T], or [T, 1 + K] with the teacher's likeliest tokens after each. further: the same row for layers
    that predict further tokens, each with what it predicts. counted: for routers.
    """

    micro: MicroBatch
    row: Row
    segments: Tensor
    targets: Tensor
    further: tuple[Row, ...]
    counted: Counted | None

    @property
    def samples(self) -> int:
        """Samples of the micro-batch, on whichever context-parallel rank their tokens are."""
        return len(self.micro.pieces)


@dataclass(frozen=True)
class Predicted:
    """What the last stage gives of the trained tokens. own: log-probabilities of a policy, values of a critic; [T].

    top: [T, K], log-probabilities of the teacher's likeliest tokens; entropy: [T]; None unless asked for.
    """

    own: Tensor
    top: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Head:
    """What the last stage computes from hidden states. top: also for the teacher's likeliest tokens."""

    vocabulary: int
    temperature: float
    entropy: bool
    top: bool = False

    def __call__(self, states: Tensor, weight: Tensor, places: tuple[Tensor, Tensor], config: Any) -> Tensor:
        """States [N, 1, H] and this rank's rows of the output layer to [T, M], log-probabilities and then the entropy
        if it is asked for. places: `sources` and `targets` of a `Row`."""
        sources, targets = places
        if config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=True)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(states)
        logprobs, entropy = token_logprobs(
            hidden[:, 0][sources],
            weight,
            targets if targets.dim() > 1 else targets[:, None],
            vocabulary=self.vocabulary,
            temperature=self.temperature,
            entropy=self.entropy,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        return logprobs if entropy is None else torch.cat([logprobs, entropy[:, None]], dim=1)

    def split(self, output: Tensor) -> Predicted:
        """What `__call__` has put together."""
        logprobs = output[:, :-1] if self.entropy else output
        return Predicted(logprobs[:, 0], logprobs[:, 1:] if self.top else None, output[:, -1] if self.entropy else None)


class ValueHead:
    """The same for a critic: values, float32 [T, 1]. Its weight is whole on every tensor-parallel rank, so each
    computes all of them."""

    top = False

    def __call__(self, states: Tensor, weight: Tensor, places: tuple[Tensor, Tensor], config: Any) -> Tensor:
        """weight: [1, H]."""
        if config.sequence_parallel:
            states = tensor_parallel.gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
        return F.linear(states[:, 0][places[0]].float(), weight.float())

    def split(self, output: Tensor) -> Predicted:
        """As that of `Head`."""
        return Predicted(output[:, 0])


@dataclass(frozen=True)
class Size:
    """Tokens and samples that are read of a mini-batch, on all ranks together."""

    tokens: int
    samples: int


Objective = Callable[[Task, Predicted, Sequence[Tensor]], Tensor]
"""Of a task, what is predicted of it, and log-probabilities [T] at temperature 1 of what each further layer predicts:
the scalar to be differentiated."""


class _SumOverContext(torch.autograd.Function):
    """The sum over context-parallel ranks, whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        sums = sums.clone()
        dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad, group=parallel_state.get_context_parallel_group())
        return grad


def over_context(sums: Tensor) -> Tensor:
    """Adds up [S] partial sums of samples that are cut over context-parallel ranks, with a gradient."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return sums
    summed: Tensor = _SumOverContext.apply(sums)  # type: ignore[no-untyped-call]
    return summed


def cut_of(config: Any) -> Cut:
    """How rows must be divisible under a layout."""
    return Cut(
        context=config.context_parallel_size,
        multiple=config.tensor_model_parallel_size if config.sequence_parallel else 1,
    )


def on_last_stage() -> bool:
    """Whether this rank computes losses."""
    return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))


class Passes:
    """Runs micro-batches through the chunks of this rank. chunks: wrapped for training. config: the model's."""

    def __init__(self, chunks: list[nn.Module], config: Any, device: torch.device) -> None:
        self.chunks, self.config, self.device = chunks, config, device
        self.cut = cut_of(config)
        config.finalize_model_grads_func = _finalize

    def overlap(self, ddp: Any) -> None:
        """Lets gradients travel while passes run, if DistributedDataParallelConfig says so."""
        found = [chunk.no_sync for chunk in self.chunks] if ddp.overlap_grad_reduce else None
        self.config.no_sync_func = found[0] if found and len(found) == 1 else found

    def forward(self, batch: Batch, micros: Sequence[MicroBatch], head: Head | ValueHead) -> list[tuple[Task, Tensor]]:
        """Log-probabilities or values [T] of each micro-batch, without gradient; nothing on all but the last stage's
        ranks."""

        def loss(task: Task, output: Tensor, further: Sequence[Tensor]) -> tuple[Tensor, Tensor, Any]:
            return output.sum(), _no_tokens(), (task, output[:, 0].detach())

        with torch.no_grad():
            return self._run([self._task(batch, micro, head) for micro in micros], head, loss, forward_only=True)

    def forward_backward(
        self, batch: Batch, micros: Sequence[MicroBatch], head: Head | ValueHead, objective: Objective, size: Size
    ) -> list[tuple[Task, Tensor]]:
        """Leaves the summed gradients in the buffers. Returns what `forward` returns."""

        def loss(task: Task, output: Tensor, further: Sequence[Tensor]) -> tuple[Tensor, Tensor, Any]:
            value = objective(task, head.split(output), further)
            value = value * 0.0 if task.micro.dummy else value
            _count_again(value, task)
            return value, _no_tokens(), (task, output[:, 0].detach())

        tasks = [self._task(batch, micro, head, size) for micro in micros]
        try:
            return self._run(tasks, head, loss, forward_only=False)
        finally:
            router.counting(None)

    def _run(
        self, tasks: Sequence[Task], head: Head | ValueHead, loss: Callable[..., Any], *, forward_only: bool
    ) -> list[tuple[Task, Tensor]]:
        def step(tasks: Iterator[Task], chunk: nn.Module) -> tuple[Tensor, Any]:
            task = next(tasks)
            further: list[Tensor] = []
            router.counting(task.counted)
            with filler(task.micro.dummy):
                output = self._forward(task, chunk, head, further)
            _count_again(output, task)
            return output, lambda output: loss(task, output, further)

        found: list[tuple[Task, Tensor]] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(tasks) for _ in self.chunks] if len(self.chunks) > 1 else iter(tasks),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(tasks),
            seq_length=self._longest(tasks),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return found

    def _longest(self, tasks: Sequence[Task]) -> int:
        return max(len(task.row.tokens) for task in tasks) * self.cut.context

    def _task(self, batch: Batch, micro: MicroBatch, head: Head | ValueHead, size: Size | None = None) -> Task:
        """size: None for a pass without gradient, which needs no more than the tokens."""
        rank = parallel_state.get_context_parallel_rank()
        indices = row(batch, micro, self.cut, rank)
        layers = range(1, 1 + (self.config.mtp_num_layers or 0)) if size is not None else ()
        further = tuple(row(batch, micro, self.cut, rank, skipped) for skipped in layers)
        counted = None if size is None or not router.counts(self.config) else self._counted(micro, indices, size)
        targets = indices.targets
        if head.top:
            targets = np.concatenate([targets[:, None], batch["teacher_top_tokens"][indices.rows]], 1, dtype=np.int64)
        return Task(micro, indices, self.move(indices.segments), self.move(targets), further, counted)

    def _counted(self, micro: MicroBatch, indices: Row, size: Size) -> Counted:
        left = np.zeros_like(indices.left) if micro.dummy else indices.left
        return Counted(self.move(indices.samples), self.move(left), len(micro.pieces), size.tokens, size.samples)

    def _forward(self, task: Task, chunk: nn.Module, head: Head | ValueHead, further: list[Tensor]) -> Tensor:
        """further: where log-probabilities of further tokens go."""
        own = (self.move(task.row.sources), task.targets)
        others = [(self.move(row.sources), self.move(row.targets)) for row in task.further]
        output: Tensor = chunk(
            input_ids=self.move(task.row.tokens)[None],
            position_ids=self.move(task.row.positions)[None],
            attention_mask=None,
            packed_seq_params=self._packed(task.row),
            output_processor=_last_stage,
            output_processor_context=(head, [own, *others], further),
        )
        return output

    def _packed(self, indices: Row) -> PackedSeqParams:
        bounds = self.move(indices.bounds.astype(np.int32))
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=indices.longest,
            max_seqlen_kv=indices.longest,
        )

    def move(self, values: Any) -> Tensor:
        """A numpy array on this rank's device, without waiting for what that computes."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def _no_tokens() -> Tensor:
    """What Megatron would divide by."""
    return torch.ones((), dtype=torch.int)


def _finalize(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Sums gradients over ranks and divides by nothing."""
    finalize_model_grads(model, None, **kwargs)


def _count_again(output: Tensor, task: Task) -> None:
    """Says what routers count when the backward pass of a micro-batch begins, which may compute them again."""
    if task.counted is not None and output.requires_grad:
        output.register_hook(lambda _: router.counting(task.counted))  # type: ignore[no-untyped-call]


def _last_stage(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: Any,
    config: Any,
    further: Sequence[Tensor] = (),
    **_: Any,
) -> Tensor:
    """What the head computes of the trained tokens, [T, M]."""
    head, (own, *others), found = context
    weight = output_layer.weight if output_weight is None else output_weight
    output: Tensor = head(hidden_states, weight, own, config)
    weight = weight.detach() if config.mtp_detach_heads else weight
    for states, places in zip(further, others, strict=True):
        plain = Head(head.vocabulary, temperature=1.0, entropy=False)
        found.append(plain(states, weight, places, config)[:, 0])
    return output


def reduced(metrics: Mapping[str, Any] | None) -> Any:
    """What the last stage's ranks know, on all ranks of the pipeline. A collective."""
    found = [metrics]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast_object_list(found, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return found[0]
