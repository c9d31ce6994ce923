"""Weights between a Hugging Face folder and Megatron's distributed format, without a GPU, a parameter at a time.

The model is built on PyTorch's "meta" device, where tensors have shapes and no bytes, to learn what the checkpoint
holds under which names. Bytes are there for one parameter when it is written, for one file or bucket when it is read.

    DST/config.json, tokenizer, …    as beside the weights of the Hugging Face folder
    DST/dist/                        the weights in Megatron's `torch_dist` format: any layout can load them
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from miles_core.errors import UserError
from miles_core.megatron import MegatronModel
from miles_core.roles import BucketLayout
from miles_core.run.checkpoint import sync
from miles_megatron import checkpoint, families, model, pretrained, settings
from miles_megatron.layout import Layout
from miles_megatron.options import TrainerOptions
from miles_megatron.weights import Folder, Mapped, Source, Table, check_copies, order

BUCKET_BYTES = 2**30
"""As much is read from a checkpoint at once, unless one parameter is larger."""


def hf_to_dist(source: Path, target: Path) -> None:
    """Writes the weights of a Hugging Face folder in Megatron's distributed format. Raises `UserError`."""
    with _whole(target) as folder, _one_rank():
        if not any(source.glob("*.safetensors")):
            raise UserError(f"{source} has no weights (*.safetensors)")
        weights = Folder(source)
        skeleton = _Skeleton(source, weights.names, _predictions_in(weights.names))
        weights.check(skeleton.table, skeleton.shapes)
        pretrained.copy_rest(source, folder)
        for own in skeleton.own:
            own.give_type(weights.dtype(own.mapped.hf))
        (folder / checkpoint.FOLDER).mkdir()
        writer = _Writer(_Reader(skeleton, weights))
        state = {own.key: own.entry for own in skeleton.own}
        content = checkpoint.content(skeleton.table.copies)
        place = str(folder / checkpoint.FOLDER)
        dist_checkpointing.save(state, place, sharded_strategy=writer, content_metadata=content)


def dist_to_hf(source: Path, target: Path) -> None:
    """Writes a Hugging Face folder with the weights in Megatron's distributed format, from `hf_to_dist` or from a
    training checkpoint. Raises `UserError`."""
    folder = source / checkpoint.FOLDER
    if not (folder / "metadata.json").is_file():
        raise UserError(
            f"{source} holds no checkpoint in Megatron's distributed format ({checkpoint.FOLDER}/metadata.json); "
            "name the folder that convert hf-to-dist wrote, or RUN/checkpoints/STEP/trainer"
        )
    with _whole(target) as made, _one_rank():
        stored = checkpoint.types(folder)
        if model.VALUE_HEAD in stored:
            raise UserError(f"{source} holds a critic, which Hugging Face's format has no model for; name the policy's")
        skeleton = _Skeleton(source, checkpoint.copies(folder), _predictions_of(stored))
        for own in skeleton.own:
            own.give_type(stored.get(own.entry.key, torch.float32))
        pretrained.write(made, source, skeleton.layout(), skeleton.read(folder))


# ---- The model, without bytes ------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Own:
    """A parameter. key: of `entry` in Megatron's state; mapped: the Hugging Face tensors that it is made of."""

    key: str
    entry: Any
    shape: tuple[int, ...]
    mapped: Mapped

    def give_type(self, dtype: torch.dtype) -> None:
        """The type that it has in files, where it may be another than in training."""
        self.put(torch.empty(self.shape, dtype=dtype, device="meta"))

    def put(self, whole: Tensor) -> None:
        """Its bytes, or None of them."""
        if isinstance(self.entry, ShardedTensor):
            self.entry = dataclasses.replace(self.entry, data=whole, dtype=whole.dtype)
        else:
            self.entry.data = whole

    @property
    def dtype(self) -> torch.dtype:
        """As given."""
        found: torch.dtype = self.entry.data.dtype
        return found

    @property
    def bytes(self) -> int:
        """How many it has."""
        size: int = self.entry.data.nbytes
        return size

    def parts(self) -> list[ShardedTensor]:
        """What is stored of it: halves, for a gate and what it gates."""
        if not isinstance(self.entry, ShardedTensorFactory):
            return [self.entry]
        built: list[ShardedTensor] = list(self.entry.build())
        return built


class _Skeleton:
    """A model by its config.json, built for one rank. held: see `Table`. predictions: how many layers beyond the last
    one it has, given its description. Raises `UserError` if no installed family describes it."""

    def __init__(self, folder: Path, held: Collection[str], predictions: Callable[[MegatronModel], int]) -> None:
        config = folder / "config.json"
        try:
            fields = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{config} cannot be read, so it is not known what the weights are of: {error}") from error
        description = families.describe(fields)
        layers = predictions(description)
        description = description.predicting(layers)
        further = {"mtp_num_layers": layers} if layers else {}
        options = TrainerOptions(
            transformer={"transformer_impl": "local", **further}, parallel={"use_cpu_initialization": True}
        )
        with torch.device("meta"):
            chunks = model.build(settings.transformer(options, description, 1), description, torch.device("meta"))
        self.table = Table(description, held)
        entries = checkpoint.policy_tensors(chunks)["model"]
        by_tensor = {id(entry.data): (key, entry) for key, entry in entries.items()}
        self.own = [
            _Own(*by_tensor[id(own.tensor)], own.shape, self.table.find(own.name))
            for own in sorted(model.parameters(chunks), key=lambda own: order(own.name))
        ]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all Hugging Face tensors that the model is made of."""
        return {name: shape for part in self.layout() for name, shape in zip(part.names, part.shapes, strict=True)}

    def layout(self) -> list[BucketLayout]:
        """What `read` gives, parameter by parameter."""
        made = []
        for own in self.own:
            found = dict(self.table.tensors(own.mapped, torch.empty(own.shape, device="meta")))
            shapes = tuple(tuple(tensor.shape) for tensor in found.values())
            dtype = str(own.dtype).removeprefix("torch.")
            made.append(BucketLayout(names=tuple(found), shapes=shapes, dtype=dtype))
        return made

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors of a checkpoint, a bucket in memory at a time."""
        for bucket in self._buckets():
            wholes = [torch.empty(own.shape, dtype=own.dtype) for own in bucket]
            asked: dict[str, ShardedTensor] = {}
            for own, whole in zip(bucket, wholes, strict=True):
                own.put(whole)
                asked |= {f"{own.key}/{number}": _by_itself(part) for number, part in enumerate(own.parts())}
                own.give_type(whole.dtype)
            checkpoint.read(asked, folder, {}, partly=True)  # into the storage of `wholes`
            while wholes:
                yield from self.table.tensors(bucket[-len(wholes)].mapped, wholes.pop(0))

    def _buckets(self) -> Iterator[list[_Own]]:
        bucket: list[_Own] = []
        for own in self.own:
            if bucket and sum(each.bytes for each in bucket) + own.bytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(own)
        yield bucket


def _by_itself(part: ShardedTensor) -> ShardedTensor:
    """The same part of a tensor that holds several layers, as a part with axes for them: Megatron wants all parts of
    the former together."""
    shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    return dataclasses.replace(part, data=part.data.view(shape), local_shape=shape, prepend_axis_num=0)


def _predictions_in(names: Collection[str]) -> Callable[[MegatronModel], int]:
    """How many layers beyond the last one a Hugging Face folder with these tensors has."""

    def count(description: MegatronModel) -> int:
        there = [any(name in names for own in layer.weights for name in own.hf) for layer in description.predictions]
        return sum(there)

    return count


def _predictions_of(keys: Collection[str]) -> Callable[[MegatronModel], int]:
    """The same, of a checkpoint with these keys."""

    def count(description: MegatronModel) -> int:
        numbers = range(len(description.predictions))
        return sum(any(key.startswith(f"mtp.layers.{number}.") for key in keys) for number in numbers)

    return count


# ---- Writing -----------------------------------------------------------------------------------------------------


class _Reader:
    """The bytes of each stored part, of which the last parameter's stay in memory."""

    def __init__(self, skeleton: _Skeleton, source: Source) -> None:
        self._table, self._source = skeleton.table, source
        self._where = {
            (part.key, part.global_offset): (own, number)
            for own in skeleton.own
            for number, part in enumerate(own.parts())
        }
        self._last: tuple[_Own | None, list[ShardedTensor]] = (None, [])

    def get(self, key: str, offset: Sequence[int]) -> Tensor:
        """The part of the whole tensor `key` that begins at `offset`."""
        own, number = self._where[key, tuple(offset)]
        if self._last[0] is not own:
            self._last = (None, [])  # first, so that there are never two
            self._last = (own, self._parts(own))
        data: Tensor = self._last[1][number].data
        return data

    def _parts(self, own: _Own) -> list[ShardedTensor]:
        shapes = self._table.shapes(own.mapped, own.shape)
        tensors = [self._source.get(name, shape) for name, shape in zip(own.mapped.hf, shapes, strict=True)]
        check_copies(own.mapped, tensors, self._source)
        own.put(self._table.join(own.mapped, tensors, own.shape[0]))
        parts = own.parts()
        own.give_type(own.dtype)
        return parts


class _Writer(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's own way to store a checkpoint, but for where the bytes come from."""

    def __init__(self, reader: _Reader) -> None:
        super().__init__()
        self._reader = reader

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Writes one tensor after another."""
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        save_state(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=_Planner(self._reader),
        )


class _Planner(MCoreSavePlanner):  # type: ignore[misc]
    """Finds the bytes when they are written and not before."""

    def __init__(self, reader: _Reader) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
        self._reader = reader

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The tensor, or what an object was serialised to."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        return self._reader.get(write_item.index.fqn, chunk.offsets).view(chunk.sizes)


# ---- Around it ---------------------------------------------------------------------------------------------------


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder that gets the name `target` when everything is in it. Raises `UserError` if there is one already."""
    if target.exists():
        raise UserError(f"{target} exists already; remove it, or name another folder")
    folder = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
        sync(folder)
        folder.rename(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    except CheckpointException as failed:  # PyTorch's, which is no `Exception`
        reason = next((error for error, _ in failed.failures.values()), failed)
        if isinstance(reason, UserError):  # of what is read, while it is written
            raise reason from None
        raise UserError(f"{target} cannot be written: {reason}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _one_rank() -> Iterator[None]:
    """Megatron's process groups, of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model.divide_ranks(Layout.of({}), seed=0, timeout_s=600)
        yield
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
