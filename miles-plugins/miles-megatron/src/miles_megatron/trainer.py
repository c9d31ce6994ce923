"""The trainer `megatron`: one rank of a model that Megatron-core spreads over tensor, pipeline, context, expert and
data-parallel ranks.

What a mini-batch computes does not depend on any of it: the objective is a sum over tokens (`miles_megatron.passes`),
micro-batches are formed alike on every rank (`miles_megatron.packing`), and weights leave whole and under their Hugging
Face names (`miles_megatron.weights`).

Shapes: N tokens of a batch; T trained tokens of a micro-batch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer
from numpy.typing import NDArray
from torch import Tensor, nn

from miles_core.errors import RunError, UserError
from miles_core.megatron import MegatronModel
from miles_core.roles import (
    Bucket,
    BucketLayout,
    LossInputs,
    LossOutputs,
    Segments,
    TrainerContext,
    TrainStage,
    Written,
)
from miles_core.run.mismatch import mismatch
from miles_core.sample import Batch
from miles_megatron import adam, checkpoint, clipping, families, model, pretrained, router, schedule, settings
from miles_megatron.layout import Layout, further_layers
from miles_megatron.offload import Offload
from miles_megatron.options import TrainerOptions
from miles_megatron.packing import MicroBatch, pieces, plan
from miles_megatron.passes import (
    Head,
    Passes,
    Predicted,
    Size,
    Task,
    ValueHead,
    on_last_stage,
    over_context,
    reduced,
)
from miles_megatron.reference import Reference
from miles_megatron.weights import Exporter, Folder, Fresh, Table, load
from miles_torch.faults import first_not_finite, loss_fault
from miles_torch.metrics import Sums, report, summary

_COLUMNS = frozenset(
    {
        "advantages", "old_logprobs", "rollout_logprobs", "staleness", "ref_logprobs",
        "teacher_logprobs", "teacher_top_logprobs",
    }
)  # fmt: skip
"""Columns of a batch that are fields of `LossInputs`."""


class MegatronTrainer:
    """One rank. See `miles_core.roles.Trainer`."""

    predicts = "log-probability"
    """What its model gives of a token, in words."""

    def __init__(self, options: TrainerOptions, context: TrainerContext) -> None:
        self.options, self.context = options, context
        self._optimizer: Any = None
        self._offload = Offload()
        self._reference: Reference | None = None

    # ---- Life ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Joins the other ranks, builds this rank's part of the model, loads its weights, tells `model_built`."""
        context = self.context
        torch.set_num_threads(context.threads)
        self._config_json = json.loads((context.model / "config.json").read_text(encoding="utf-8"))
        self._model = self._describe()
        self._device = self._take_device()
        self._config = self._configured()
        self._join()
        chunks = self._build()
        self._load(chunks)
        self._bare: Any = model.bare(chunks[0]) if len(chunks) == 1 else nn.ModuleList(map(model.bare, chunks))
        if context.hooks is not None:
            context.hooks.model_built(context=context, model=self._bare)
        self._ddp = settings.ddp(self.options)
        self._chunks = [DistributedDataParallel(self._config, self._ddp, chunk) for chunk in chunks]
        self._passes = Passes(self._chunks, self._config, self._device)
        self._passes.overlap(self._ddp)

    def _take_device(self) -> torch.device:
        if not self.context.gpus:
            return torch.device("cpu")
        device = torch.device("cuda", self.context.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def _join(self) -> None:
        """A critic that shares the policy's ranks finds them joined and divided."""
        context = self.context
        if dist.is_initialized():
            return
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if context.gpus else "gloo",
            init_method=context.address,
            rank=context.rank,
            world_size=context.world_size,
            timeout=timedelta(seconds=context.timeout_s),
        )
        model.divide_ranks(Layout.of(self.options.parallel), context.seed, context.timeout_s)

    def _describe(self) -> MegatronModel:
        found = families.describe(self._config_json)
        return found.predicting(further_layers(self.options, found))

    def _configured(self) -> Any:
        return settings.transformer(self.options, self._model, self.context.world_size)

    def _build(self) -> list[nn.Module]:
        return model.build(self._config, self._model, self._device)

    def _load(self, chunks: list[nn.Module]) -> None:
        folder = self.context.model
        if (folder / checkpoint.FOLDER).is_dir():
            self._exporter = Exporter(chunks, Table(self._model, checkpoint.copies(folder / checkpoint.FOLDER)))
            state = checkpoint.policy_tensors(chunks)
            checkpoint.put_model(chunks, checkpoint.read(state, folder / checkpoint.FOLDER, {}), tensors_only=True)
        elif any(folder.glob("*.safetensors")):
            self._load_folder(chunks, folder)
        else:
            table = Table(self._model)
            self._exporter = Exporter(chunks, table)
            load(chunks, table, Fresh(self.context.seed, float(self._config_json.get("initializer_range", 0.02))))

    def _load_folder(self, chunks: list[nn.Module], folder: Path) -> None:
        """The weights of a Hugging Face folder. Raises `UserError` if they are not those of the model."""
        source = Folder(folder)
        table = Table(self._model, source.names)
        self._exporter = Exporter(chunks, table)
        source.check(table, self._exporter.shapes)
        load(chunks, table, source)

    def begin(self, stage: TrainStage) -> None:
        """A new optimizer and schedule; the reference becomes a copy of the weights as they are now."""
        options: TrainerOptions = stage.options
        for name in ("transformer", "parallel", "ddp"):
            if dict(getattr(options, name)) != dict(getattr(self.options, name)):
                raise UserError(f"stage {stage.name!r}: trainer.{name} is for the whole run; set it once, in [trainer]")
        self._stage, self._stage_options = stage, options
        self._optimizer = self._made_optimizer(options)
        self._scheduler = schedule.build(self._optimizer, options, stage.optimizer_steps)
        self._zero()
        if self._reference is not None:
            self._reference.remember(self._tensors())
        elif self.context.reference:
            self._reference = Reference(self._tensors())

    def _made_optimizer(self, options: TrainerOptions) -> Any:
        config = settings.optimizer(options, self._ddp)
        adam.patch()
        try:
            return get_megatron_optimizer(config, self._chunks)
        except (AssertionError, ImportError, ValueError) as error:
            raise UserError(f"[trainer.optimizer]: Megatron-core refuses this: {error}") from error

    def sleep(self) -> None:
        """Gives the memory of parameters, gradients and optimizer back; everything waits in host memory."""
        self._offload.sleep(self._kept(), self._gradients())
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """The opposite of `sleep`."""
        self._offload.wake()

    def _kept(self) -> Iterator[Tensor]:
        """What must survive."""
        yield from self._tensors()
        for optimizer in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            inner = getattr(optimizer, "optimizer", None)
            for group in inner.param_groups if inner is not None else ():
                yield from group["params"]
            for state in inner.state.values() if inner is not None else ():
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim)

    def _tensors(self) -> list[Tensor]:
        """This rank's part of the model."""
        return [own.tensor for own in model.parameters([*self._chunks])]

    def _gradients(self) -> Iterator[Tensor]:
        for chunk in self._chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data

    def stop(self) -> None:
        """Leaves the process groups."""
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    # ---- Numbers ---------------------------------------------------------------------------------------------

    def logprobs(self, batch: Batch, which: Literal["policy", "reference"], step: int) -> NDArray[np.float32] | None:
        """Token column [N] on rank 0. Packs exactly as `update` does, so that nothing differs before an update."""
        context = self.context
        if context.hooks is not None:
            context.hooks.before_logprobs(context=context, step=step, model=self._bare)
        if which == "policy":
            return self._column_of(batch)
        assert self._reference is not None, "the run was planned without a reference"
        with self._reference.in_place_of(self._tensors()):
            return self._column_of(batch)

    def _column_of(self, batch: Batch) -> NDArray[np.float32] | None:
        column = torch.zeros(batch.tokens_total)
        for chunk in self._chunks:
            chunk.eval()
        for samples in _minibatches(batch):
            micros, _ = self._plan(batch, samples)
            if not micros:
                continue
            for task, predicted in self._passes.forward(batch, micros, self._head(batch, training=False)):
                if not task.micro.dummy and parallel_state.get_tensor_model_parallel_rank() == 0:
                    column[torch.from_numpy(task.row.rows)] = predicted.float().cpu()
        dist.reduce(column, dst=0)
        return column.numpy() if self.context.rank == 0 else None

    def update(self, batch: Batch, step: int, passes: int) -> Mapping[str, float]:
        """See `miles_core.roles.Trainer.update`, and `miles_torch.trainer` for the metrics, which are the same."""
        minibatches = _minibatches(batch)
        count = passes * len(minibatches)
        if count > 1 and "old_logprobs" in self._stage.needs and "old_logprobs" not in batch:
            raise ValueError(f"{count} optimizer steps on a batch need its column old_logprobs")
        reports: list[dict[str, float]] = []
        for number in range(count):
            first = not any(done["tokens"] for done in reports)
            reports.append(self._optimizer_step(batch, minibatches[number % len(minibatches)], step, first=first))
        return summary(reports, passes)

    def _optimizer_step(self, batch: Batch, samples: Sequence[int], step: int, *, first: bool) -> dict[str, float]:
        hooks = self.context.hooks
        told = {"context": self.context, "step": step, "model": self._bare, "optimizer": self._optimizer}
        if hooks is not None:
            part = batch if len(samples) == len(batch) else batch.select(samples)
            hooks.before_train_step(**told, batch=part)
        started = time.perf_counter()
        metrics = self._forward_backward(batch, samples, first=first)
        metrics["learning_rate"] = schedule.rate(self._optimizer)
        fault = metrics.pop("fault", None)
        metrics["grad_norm"] = norm = clipping.gradient_norm(self._optimizer)
        if fault is None and not math.isfinite(norm):
            fault = (
                f"step {step}: the gradient norm is {norm} although all losses are finite. "
                "A lower learning rate, or float32, may help."
            )
        if fault is None:
            clipping.step(self._optimizer, norm)
        else:
            self._skip(fault, told)
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)} | {"skipped_steps": 1.0}
        self._scheduler.step(1)
        self._zero()
        metrics["train_seconds"] = time.perf_counter() - started
        if hooks is not None:
            hooks.after_train_step(**told, metrics=metrics)
        return metrics

    def _skip(self, fault: str, told: Mapping[str, Any]) -> None:
        """Asks the callbacks whether a step that is not finite may be skipped. Raises `RunError` if it may not."""
        if self.context.hooks is None or not self.context.hooks.step_not_finite(**told, fault=fault):
            raise RunError(fault)

    def _zero(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def _forward_backward(self, batch: Batch, samples: Sequence[int], *, first: bool) -> dict[str, Any]:
        """Metrics on every rank, with a `fault` if the loss is not finite."""
        sums = Sums(self._device, parallel_state.get_data_parallel_group(with_context_parallel=True))
        given: list[tuple[Task, Tensor, Tensor]] = []  # looked at only if something is wrong: to look is to wait

        def objective(task: Task, predicted: Predicted, further: Sequence[Tensor]) -> Tensor:
            value, losses = self._objective(batch, task, predicted, sums, first=first)
            if not task.micro.dummy:
                given.append((task, predicted.own.detach(), losses.detach()))
            return value + self._further(batch, task, further, sums) if further else value

        for chunk in self._chunks:
            chunk.train()
        micros, size = self._plan(batch, samples)
        if micros:
            self._passes.forward_backward(batch, micros, self._head(batch, training=True), objective, size)
        found: dict[str, Any] = report(sums.reduce()) if on_last_stage() else {}
        found = reduced(found) | router.metrics(self._config, self._device)
        if not math.isfinite(found["loss"]):
            said = (
                first_not_finite(batch, task.row.rows, task.row.targets, self.predicts, *own) for task, *own in given
            )
            found["fault"] = loss_fault(said, self.context.world_size)
        return found

    def _objective(
        self, batch: Batch, task: Task, predicted: Predicted, sums: Sums, *, first: bool
    ) -> tuple[Tensor, Tensor]:
        """sum(weights * losses) of a micro-batch, and the losses."""
        segments = Segments(ids=task.segments, count=task.samples, reduce=over_context)
        outputs = self._loss(batch, task, predicted, segments)
        if outputs.losses.shape != predicted.own.shape:
            raise RunError(
                f"the loss gave {tuple(outputs.losses.shape)} values for {len(predicted.own)} trained tokens; "
                "it must give one per token and average nothing."
            )
        weighted = outputs.losses * self._column(batch, "weights", task)
        observed = {"loss": weighted, **outputs.metrics, **self._observed(batch, task, predicted, first=first)}
        for name, values in observed.items():
            sums.add(name, values, count=not task.micro.dummy)
        return weighted.sum(), outputs.losses

    def _loss(self, batch: Batch, task: Task, predicted: Predicted, segments: Segments) -> LossOutputs:
        needs = self._stage.needs & _COLUMNS
        columns = {name: self._column(batch, name, task) for name in needs if name in batch}
        if "old_logprobs" in needs and "old_logprobs" not in batch:
            columns["old_logprobs"] = predicted.own.detach()
        inputs = LossInputs(
            logprobs=predicted.own,
            segments=segments,
            entropy=predicted.entropy,
            top_logprobs=predicted.top,
            **columns,
        )
        return self._stage.loss(inputs, self._stage.options_for(batch))

    def _observed(self, batch: Batch, task: Task, predicted: Predicted, *, first: bool) -> Mapping[str, Tensor]:
        """Metrics that are not the loss's own."""
        found = {} if predicted.entropy is None else {"entropy": predicted.entropy}
        if first:
            rollout = self._column(batch, "rollout_logprobs", task)
            made = self._passes.move(np.flatnonzero(batch["versions"][task.row.rows] >= 0))
            found |= mismatch(predicted.own.detach()[made], rollout[made])
        return found

    def _further(self, batch: Batch, task: Task, further: Sequence[Tensor], sums: Sums) -> Tensor:
        """The loss of layers that predict further tokens: each token's cross entropy, weighted as the token is, means
        over the layers."""
        total = torch.zeros((), device=self._device)
        for row, logprobs in zip(task.further, further, strict=True):
            weights = self._passes.move(batch["weights"][row.rows].astype(np.float32))
            total = total - (weights * logprobs).sum()
            sums.add("mtp/cross_entropy", -logprobs, count=not task.micro.dummy)
        return total * float(self._config.mtp_loss_scaling_factor / len(further))

    def _plan(self, batch: Batch, samples: Sequence[int]) -> tuple[list[MicroBatch], Size]:
        """This rank's micro-batches, and the size of all."""
        found = pieces(batch, samples, self._passes.cut)
        ranks = parallel_state.get_data_parallel_world_size()
        group = self._config.pipeline_model_parallel_size if len(self._chunks) > 1 else 1
        budget = self._stage_options.micro_batch_tokens
        planned = plan(found, budget=budget, ranks=ranks, group=group)
        size = Size(sum(piece.length for piece in found), len(found))
        return planned[parallel_state.get_data_parallel_rank()], size

    def _head(self, batch: Batch, *, training: bool) -> Head | ValueHead:
        """Greedy sampling reports log-probabilities at temperature 1."""
        entropy = training and self._stage.entropy
        top = training and "teacher_top_tokens" in self._stage.needs
        return Head(self._model.gpt["vocab_size"], batch.temperature or 1.0, entropy, top)

    def _column(self, batch: Batch, name: str, task: Task) -> Tensor:
        return self._passes.move(batch[name][task.row.rows].astype(np.float32))

    # ---- Weights ---------------------------------------------------------------------------------------------

    def layout(self) -> Sequence[BucketLayout]:
        """What `export` will yield."""
        return self._exporter.layout()

    def export(self) -> Iterator[Bucket]:
        """See `miles_core.roles.Trainer.export`. Only rank 0's buckets hold bytes."""
        return self._exporter.buckets()

    def save(self, folder: Path) -> Written | None:
        """Everything that `restore` needs; see `miles_megatron.checkpoint` for the files."""
        state = checkpoint.model_state(self._chunks)
        sharded, rest = checkpoint.optimizer_state(self._optimizer, state, loading=False)
        options = self._stage_options.checkpoint
        reference = [] if self._reference is None else self._reference.for_writing()
        whole = {**state, **sharded, **self._reference_state(reference)}
        written = checkpoint.write(whole, folder / checkpoint.FOLDER, options, self._exporter.table.copies)
        counts = {"optimizer_steps": self._scheduler.num_steps, "steps_taken": checkpoint.steps_taken(rest)}
        checkpoint.write_record(folder, {"stage": self._stage.name, **counts})
        if self.context.rank == 0:
            self._copy_rest(folder)
        return written

    def _copy_rest(self, folder: Path) -> None:
        """So that the checkpoint is a model folder by itself."""
        pretrained.copy_rest(self.context.model, folder)

    def restore(self, folder: Path) -> None:
        """The opposite of `save`, under any layout, after `begin`. Raises `UserError` if it does not fit."""
        record = checkpoint.read_record(folder, self._stage.name)
        state = checkpoint.model_state(self._chunks)
        sharded, rest = checkpoint.optimizer_state(self._optimizer, state, loading=True)
        options = self._stage_options.checkpoint
        reference = [] if self._reference is None else self._reference.tensors
        whole = {**state, **sharded, **self._reference_state(reference)}
        loaded = checkpoint.read(whole, folder / checkpoint.FOLDER, options)
        checkpoint.put_model(self._chunks, loaded)
        checkpoint.put_optimizer(self._optimizer, loaded["optimizer"], rest, int(record["steps_taken"]))
        self._scheduler.num_steps = 0
        self._scheduler.step(int(record["optimizer_steps"]))

    def _reference_state(self, reference: Sequence[Tensor]) -> dict[str, Any]:
        if not reference:
            return {}
        pairs = zip(self._tensors(), reference, strict=True)
        return checkpoint.reference_state(self._chunks, {own.data_ptr(): other for own, other in pairs})

    def save_pretrained(self, folder: Path) -> None:
        """See `miles_core.roles.Trainer.save_pretrained`. A collective; rank 0 writes."""
        tensors = self._exporter.tensors()
        if self.context.rank:
            for _ in tensors:
                pass
        else:
            pretrained.write(folder, self.context.model, self._exporter.layout(), tensors)


def _minibatches(batch: Batch) -> list[list[int]]:
    """The samples of each mini-batch; one with all of them before the batch has been divided."""
    if "minibatch" not in batch.samples:
        return [list(range(len(batch)))]
    numbers = batch.samples["minibatch"]
    return [np.flatnonzero(numbers == number).tolist() for number in range(int(numbers.max(initial=0)) + 1)]
