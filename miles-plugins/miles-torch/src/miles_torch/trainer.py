"""The trainer `torch`: any transformers causal language model, on one process or sharded by FSDP2.

The objective of a mini-batch is exactly sum(weights * losses) over all its trained tokens, on whichever rank and in
whichever micro-batch they run: gradients are summed, over micro-batches and over ranks, and never averaged.

bfloat16 means that all computing is done in bfloat16 from float32 parameters: by FSDP2's mixed precision, or where the
lean forward runs, which casts them itself. Autocast would keep the residual stream in float32, which costs memory and
moves the log-probabilities away from those of an engine that runs in bfloat16.

Shapes: N tokens of a batch; T trained tokens of a micro-batch.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from miles_core.errors import RunError, UserError
from miles_core.filler import filler
from miles_core.roles import Bucket, BucketLayout, LossInputs, LossOutputs, Segments, TrainerContext, TrainStage
from miles_core.run.mismatch import mismatch
from miles_core.sample import Batch
from miles_torch import checkpoint, export, optimizer, sharding
from miles_torch.faults import first_not_finite, loss_fault
from miles_torch.memory import keep_freed_memory
from miles_torch.metrics import Sums, report, summary
from miles_torch.model import MicroBatch, Policy, checkpoint_activations, load, weights
from miles_torch.options import TrainerOptions
from miles_torch.packing import Packed, describe, plan

_COLUMNS = frozenset(
    {
        "advantages", "old_logprobs", "rollout_logprobs", "staleness", "ref_logprobs",
        "teacher_logprobs", "teacher_top_logprobs",
    }
)  # fmt: skip
"""Batch columns that are fields of `LossInputs`."""


class _Forward(NamedTuple):
    """What a micro-batch gave, kept until it is known that all is finite. predicted: log-probabilities; both [T]."""

    packed: Packed
    predicted: Tensor
    losses: Tensor


class TorchTrainer:
    """One rank. See `miles_core.roles.Trainer`."""

    predicts = "log-probability"
    """What its network gives of a token, in words."""

    def __init__(self, options: TrainerOptions, context: TrainerContext) -> None:
        self.options, self.context = options, context
        self._reference: Policy | None = None
        self._optimizer: torch.optim.AdamW | None = None
        self._steps = 0

    # ---- Life ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Joins the other ranks, loads the model, tells `model_built`, shards."""
        context, options = self.context, self.options
        torch.set_num_threads(context.threads)
        self._device = sharding.device_of(context)
        if self._device.type == "cpu":
            keep_freed_memory()
        if context.world_size > 1:
            sharding.join(context)
        model = load(context.model, context.seed)
        self._policy = self._network(model)
        if context.hooks is not None:
            context.hooks.model_built(context=context, model=model)
        if context.reference:
            self._reference = copy.deepcopy(self._policy).requires_grad_(False)
            for parameter in self._reference.parameters():
                parameter.data = parameter.data.to(getattr(torch, options.dtype))  # what it computes in anyway
        if options.activation_checkpointing:
            checkpoint_activations(model)
        half = options.dtype == "bfloat16"
        casts = half and context.world_size == 1 and self._device.type == "cpu" and self._policy.lean
        for policy in filter(None, (self._policy, self._reference)):
            if casts:
                policy.compute_in(torch.bfloat16)
            elif half or context.world_size > 1:
                sharding.join(context)
                sharding.shard(policy, options.dtype, self._device)
            policy.to(self._device)

    def _network(self, model: Any) -> Policy:
        """What is trained, of the causal language model."""
        return Policy(model)

    def begin(self, stage: TrainStage) -> None:
        """A new optimizer and schedule; the reference becomes a copy of the weights as they are now."""
        options: TrainerOptions = stage.options
        for name in ("dtype", "activation_checkpointing"):
            if getattr(options, name) != getattr(self.options, name):
                raise UserError(
                    f"stage {stage.name!r}: trainer.{name} is for the whole run; set it once, in [trainer]."
                )
        self._stage, self._stage_options = stage, options
        self._optimizer = optimizer.build(self._policy, options.optimizer)
        self._steps = 0
        if self._reference is not None:
            with torch.no_grad():
                for own, other in zip(self._reference.parameters(), self._policy.parameters(), strict=True):
                    sharding.local(own).copy_(sharding.local(other))

    def sleep(self) -> None:
        """Gives the GPU memory back; everything waits in host memory."""
        self._move(torch.device("cpu"))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """The opposite of `sleep`."""
        self._move(self._device)

    def stop(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _move(self, device: torch.device) -> None:
        for policy in filter(None, (self._policy, self._reference)):
            policy.to(device)
        for state in self._optimizer.state.values() if self._optimizer else ():
            for name, tensor in state.items():
                state[name] = tensor.to(device)

    # ---- Numbers ---------------------------------------------------------------------------------------------

    def logprobs(self, batch: Batch, which: Literal["policy", "reference"], step: int) -> NDArray[np.float32] | None:
        """Token column [N] on rank 0. Packs exactly as `update` does, so that nothing differs before an update."""
        context = self.context
        policy = self._policy if which == "policy" else self._reference
        assert policy is not None, "the run was planned without a reference"
        if context.hooks is not None:
            context.hooks.before_logprobs(context=context, step=step, model=policy.model)
        return self._predicted(policy, batch)

    def _predicted(self, network: Policy, batch: Batch) -> NDArray[np.float32] | None:
        """Token column [N] of what a network gives, without gradient, on rank 0."""
        column = torch.zeros(batch.tokens_total)
        with torch.no_grad():
            for samples in _minibatches(batch):
                for packed in self._plan(batch, samples):
                    predicted, _ = network(self._micro(packed), _temperature(batch))
                    if not packed.dummy:
                        column[torch.from_numpy(packed.rows)] = predicted.cpu()
        sharding.reshard(network)
        if self.context.world_size > 1:
            dist.reduce(column, dst=0)
        return column.numpy() if self.context.rank == 0 else None

    def update(self, batch: Batch, step: int, passes: int) -> Mapping[str, float]:
        """See `miles_core.roles.Trainer.update`.

        Metrics: loss and grad_norm, means over the optimizer steps; learning_rate, of the last; tokens, trained ones of
        one pass over the batch; entropy and the loss's own, means over trained tokens; train_seconds, of the passes
        and the optimizer; mismatch/*, as in `miles_core.run.mismatch`, of the first mini-batch, before it is learnt.
        """
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
        hooks, context, model, adamw = self.context.hooks, self.context, self._policy.model, self._optimizer
        assert adamw is not None, "no stage has begun"
        options = self._stage_options.optimizer
        rate = optimizer.learning_rate(options, self._steps, self._stage.optimizer_steps)
        for group in adamw.param_groups:
            group["lr"] = rate
        if hooks is not None:
            part = batch if len(samples) == len(batch) else batch.select(samples)
            hooks.before_train_step(context=context, step=step, model=model, optimizer=adamw, batch=part)
        started = time.perf_counter()
        sums = Sums(self._device)
        forwards = [self._forward_backward(batch, packed, sums, first=first) for packed in self._plan(batch, samples)]
        metrics = report(sums.reduce())
        metrics["learning_rate"] = rate
        fault = None if math.isfinite(metrics["loss"]) else self._not_finite(batch, forwards)
        metrics["grad_norm"] = norm = self._clip(options.max_grad_norm)
        if fault is None and not math.isfinite(norm):
            fault = (
                f"step {step}: the gradient norm is {norm} although all losses are finite; "
                f"{self._with_broken_gradient(batch, samples)}. A lower learning rate, or dtype float32, may help."
            )
        if fault is None:
            adamw.step()
        else:
            self._skip(fault, step)
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)} | {"skipped_steps": 1.0}
        adamw.zero_grad()
        metrics["train_seconds"] = time.perf_counter() - started
        self._steps += 1
        if hooks is not None:
            hooks.after_train_step(context=context, step=step, model=model, optimizer=adamw, metrics=metrics)
        return metrics

    def _skip(self, fault: str, step: int) -> None:
        """Asks the callbacks whether a step that is not finite may be skipped. Raises `RunError` if it may not."""
        hooks, context, model = self.context.hooks, self.context, self._policy.model
        told = {"context": context, "step": step, "model": model, "optimizer": self._optimizer, "fault": fault}
        if hooks is None or not hooks.step_not_finite(**told):
            raise RunError(fault)

    def _with_broken_gradient(self, batch: Batch, samples: Sequence[int]) -> str:
        """Which sample's gradient is not finite, in words, found by halving: about two passes more. A collective that
        leaves the gradients as they were."""

        def broken(part: Sequence[int]) -> bool:
            self._repeat(batch, part)
            return not math.isfinite(self._clip(0.0))

        suspects = list(samples)
        while len(suspects) > 1:
            half = suspects[: len(suspects) // 2]
            suspects = half if broken(half) else suspects[len(half) :]
        alone = broken(suspects)
        self._repeat(batch, samples)
        if alone:
            return f"that of sample {describe(batch, suspects[0])} alone is not finite either"
        return f"none of its {len(samples)} samples gives such a gradient alone"

    def _repeat(self, batch: Batch, samples: Sequence[int]) -> None:
        """The gradients of some samples of a mini-batch, in the place of those that were there."""
        assert self._optimizer is not None, "no stage has begun"
        self._optimizer.zero_grad()
        for packed in self._plan(batch, samples):
            self._forward_backward(batch, packed, Sums(self._device), first=False)

    def _forward_backward(self, batch: Batch, packed: Packed, sums: Sums, *, first: bool) -> _Forward:
        with filler(packed.dummy):
            predicted, outputs = self._forward(batch, self._micro(packed), sums, first=first)
        if outputs.losses.shape != predicted.shape:
            raise RunError(
                f"the loss gave {tuple(outputs.losses.shape)} values for {len(predicted)} trained tokens; "
                "it must give one per token and average nothing."
            )
        weighted = outputs.losses * self._column(batch, "weights", packed)
        objective = weighted.sum()
        (objective * 0.0 if packed.dummy else objective).backward()  # type: ignore[no-untyped-call]
        counts = not packed.dummy
        sums.add("loss", weighted, count=counts)
        for name, values in outputs.metrics.items():
            sums.add(name, values, count=counts)
        return _Forward(packed, predicted.detach(), outputs.losses.detach())

    def _forward(self, batch: Batch, micro: MicroBatch, sums: Sums, *, first: bool) -> tuple[Tensor, LossOutputs]:
        """What the network predicts, [T], and the loss of that. Adds metrics that are not the loss's own."""
        packed = micro.packed
        top_tokens = self._top_tokens(batch, micro)
        logprobs, entropy = self._policy(micro, _temperature(batch), self._stage.entropy, top_tokens)
        top_logprobs = None
        if top_tokens is not None:
            logprobs, top_logprobs = logprobs[:, 0], logprobs[:, 1:]
        if entropy is not None:
            sums.add("entropy", entropy, count=not packed.dummy)
        if first:
            rollout = self._column(batch, "rollout_logprobs", packed)
            generated = torch.from_numpy(batch["versions"][packed.rows] >= 0).to(self._device)
            for name, values in mismatch(logprobs.detach()[generated], rollout[generated]).items():
                sums.add(name, values, count=not packed.dummy)
        return logprobs, self._loss(batch, micro, logprobs, entropy, top_logprobs)

    def _top_tokens(self, batch: Batch, micro: MicroBatch) -> Tensor | None:
        """Each trained token and, after it, the teacher's likeliest ones in its place, int64 [T, 1 + K]; None if the
        loss asks for none."""
        if "teacher_top_tokens" not in self._stage.needs:
            return None
        top = torch.from_numpy(batch["teacher_top_tokens"][micro.packed.rows].astype(np.int64))
        return torch.cat((micro.targets[:, None], top.to(self._device)), dim=1)

    def _not_finite(self, batch: Batch, forwards: Sequence[_Forward]) -> str:
        """What to say of a loss that is not finite. A collective."""
        found = (
            first_not_finite(batch, each.packed.rows, each.packed.targets, self.predicts, each.predicted, each.losses)
            for each in forwards
        )
        return loss_fault(found, self.context.world_size)

    def _loss(
        self, batch: Batch, micro: MicroBatch, logprobs: Tensor, entropy: Tensor | None, top_logprobs: Tensor | None
    ) -> LossOutputs:
        needs = self._stage.needs & _COLUMNS
        columns = {name: self._column(batch, name, micro.packed) for name in needs if name in batch}
        if "old_logprobs" in needs and "old_logprobs" not in batch:
            columns["old_logprobs"] = logprobs.detach()
        segments = Segments(ids=micro.segments, count=micro.packed.samples)
        inputs = LossInputs(logprobs=logprobs, segments=segments, entropy=entropy, top_logprobs=top_logprobs, **columns)
        return self._stage.loss(inputs, self._stage.options_for(batch))

    def _clip(self, limit: float) -> float:
        """Scales the gradients down to the norm `limit` (0: leaves them) and returns the norm that they had. Gradients
        that are not finite stay as they are."""
        parameters = [parameter for parameter in self._policy.parameters() if parameter.grad is not None]
        if not parameters:
            return 0.0
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = sharding.whole(norm)
        if limit and limit < norm + 1e-6 < math.inf:  # PyTorch adds that too; below, all would be multiplied by 1
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)

    def _plan(self, batch: Batch, samples: Sequence[int]) -> list[Packed]:
        return plan(
            batch,
            samples,
            budget=self._stage_options.micro_batch_tokens,
            world_size=self.context.world_size,
            share=self._policy.packed,
        )[self.context.rank]

    def _micro(self, packed: Packed) -> MicroBatch:
        half = self.options.dtype == "bfloat16" and self._device.type == "cuda"
        return MicroBatch.build(packed, self._device, ragged=half and self._policy.packed)

    def _column(self, batch: Batch, name: str, packed: Packed) -> Tensor:
        return torch.from_numpy(batch[name][packed.rows].astype(np.float32)).to(self._device)

    # ---- Weights ---------------------------------------------------------------------------------------------

    def layout(self) -> Sequence[BucketLayout]:
        """What `export` will yield, in the type that the trainer computes in."""
        return export.layout(weights(self._policy.model), getattr(torch, self.options.dtype))

    def export(self) -> Iterator[Bucket]:
        """See `miles_core.roles.Trainer.export`. Only rank 0's buckets hold bytes."""
        return export.buckets(weights(self._policy.model), self.layout(), keep=self.context.rank == 0)

    def save(self, folder: Path) -> None:
        """See `miles_torch.checkpoint` for the files. Rank 0 raises `OSError` if the disk refuses one."""
        writes = self.context.rank == 0
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        writer = checkpoint.Writer(folder, writes=writes)
        for stem, tensors in self._stored().items():
            writer.write(stem, tensors)
        states = [checkpoint.random_states()]
        if self.context.world_size > 1:
            states = states * self.context.world_size
            dist.all_gather_object(states, checkpoint.random_states())
        writer.finish(states, {"stage": self._stage.name, "optimizer_steps": self._steps})

    def restore(self, folder: Path) -> None:
        """The opposite of `save`, at any number of ranks, after `begin`. Raises `UserError` if it does not fit."""
        record = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        if record["stage"] != self._stage.name:
            raise UserError(f"{folder} was saved in stage {record['stage']!r}, not {self._stage.name!r}.")
        self._steps = int(record["optimizer_steps"])
        saved = {name.rpartition("/")[0] for name in checkpoint.names(folder, "optimizer")}
        assert self._optimizer is not None, "no stage has begun"
        self._optimizer.state.clear()
        for name, parameter in self._policy.model.named_parameters():
            if name in saved:  # a parameter has moments once it has had a gradient
                self._optimizer.state[parameter] = {
                    "step": torch.zeros((), device=self._device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        for policy in filter(None, (self._policy, self._reference)):
            sharding.reshard(policy)
        for stem, tensors in self._stored().items():
            checkpoint.fill(folder, stem, tensors)
        checkpoint.set_random_states(folder, self.context.rank)

    def _stored(self) -> dict[str, dict[str, Tensor]]:
        """File stem -> the live tensors that a checkpoint holds."""
        assert self._optimizer is not None, "no stage has begun"
        stored = {"weights": weights(self._policy.model), "optimizer": {}}
        for name, parameter in self._policy.model.named_parameters():
            for moment, tensor in self._optimizer.state.get(parameter, {}).items():
                stored["optimizer"][f"{name}/{moment}"] = tensor
        if self._reference is not None:
            stored["reference"] = weights(self._reference.model)
        return stored

    def save_pretrained(self, folder: Path) -> None:
        """See `miles_core.roles.Trainer.save_pretrained`. A collective; rank 0 writes."""
        dtype = getattr(torch, self.options.dtype)
        full: dict[str, Tensor] = {}
        for name, tensor in weights(self._policy.model).items():
            gathered = sharding.whole(tensor)
            if self.context.rank == 0:
                full[name] = gathered.to("cpu", dtype)
        if self.context.rank == 0:
            export.pretrained(full, self.context.model, folder)


def _minibatches(batch: Batch) -> list[list[int]]:
    """The samples of each mini-batch; one with all of them before the batch has been divided."""
    if "minibatch" not in batch.samples:
        return [list(range(len(batch)))]
    numbers = batch.samples["minibatch"]
    return [np.flatnonzero(numbers == number).tolist() for number in range(int(numbers.max(initial=0)) + 1)]


def _temperature(batch: Batch) -> float:
    """Greedy sampling reports log-probabilities at temperature 1."""
    return batch.temperature or 1.0
