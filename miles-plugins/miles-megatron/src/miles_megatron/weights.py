"""Weights between Hugging Face's tensors and a rank's parameters, both ways, by one mapping table.

In: each rank reads the tensors that its parameters are made of, joins them and keeps its part. Out: the ranks of a
tensor-parallel group put a parameter together, one of them sends it to rank 0, and rank 0 takes it apart into Hugging
Face's tensors. One parameter at a time is whole on any rank.

Shapes: a parameter [rows, ...]; of an attention with G key-value groups and Q heads of width D, rows (Q + 2 G) D.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from miles_core.errors import UserError
from miles_core.megatron import MegatronModel, Weight
from miles_core.roles import Bucket, BucketLayout
from miles_core.run.weight_files import check_tensors
from miles_megatron.model import Local, parameters
from miles_megatron.tensors import ignored

BUCKET_BYTES = 256 * 2**20
"""A bucket holds at most this much, unless it is one larger tensor."""


# ---- The table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mapped:
    """A parameter, its rule, the names of the Hugging Face tensors that it is made of, and of copies of them."""

    name: str
    rule: Weight
    hf: tuple[str, ...]
    copies: tuple[str, ...]


class Table:
    """A model's mapping table. held: names in its Hugging Face folder, which may hold copies of some tensors or not."""

    def __init__(self, model: MegatronModel, held: Collection[str] = ()) -> None:
        self.model = model
        self._copies: dict[str, tuple[str, ...]] = {}
        for copy, name in model.copies.items():
            if copy in held:
                self._copies[name] = (*self._copies.get(name, ()), copy)
        self._groups = model.transformer.get("num_query_groups", 0)

    def find(self, name: str) -> Mapped:
        """The rule of a parameter. Raises `UserError` unless there is exactly one."""
        found = [(rule, match) for rule in self.model.weights if (match := rule.pattern.fullmatch(name))]
        if len(found) != 1:
            many = f"{len(found)} rules" if found else "no rule"
            raise UserError(f"the family's mapping table has {many} for Megatron's parameter {name!r}")
        rule, match = found[0]
        numbers = match.groupdict()
        return Mapped(name, rule, tuple(hf.format(**numbers) for hf in rule.hf), self._copies.get(name, ()))

    def join(self, mapped: Mapped, tensors: Sequence[Tensor], rows: int) -> Tensor:
        """The whole parameter with `rows` rows: more than the tensors have where a vocabulary is padded."""
        if mapped.rule.join == "qkv":
            parts = [tensor.reshape(self._groups, -1, *tensor.shape[1:]) for tensor in tensors]
            return torch.cat(parts, dim=1).flatten(0, 1)
        if mapped.rule.join == "gate_up":
            return torch.cat(list(tensors))
        (whole,) = tensors
        return whole if len(whole) == rows else _padded(whole, rows)

    def split(self, mapped: Mapped, whole: Tensor) -> list[Tensor]:
        """The opposite of `join`."""
        if mapped.rule.join == "qkv":
            heads = self.model.transformer["num_attention_heads"] // self._groups
            width = whole.shape[0] // (self._groups * (heads + 2))
            groups = whole.reshape(self._groups, -1, *whole.shape[1:])
            return [part.flatten(0, 1) for part in torch.split(groups, [heads * width, width, width], dim=1)]
        if mapped.rule.join == "gate_up":
            return list(whole.chunk(2))
        return [whole[: self.model.gpt["vocab_size"]] if self.is_vocabulary(mapped.name) else whole]

    def shapes(self, mapped: Mapped, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Of the tensors that a parameter of a shape is made of."""
        return [tuple(part.shape) for part in self.split(mapped, torch.empty(tuple(shape), device="meta"))]

    def tensors(self, mapped: Mapped, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """All that a Hugging Face folder holds of a whole parameter."""
        parts = self.split(mapped, whole)
        yield from zip(mapped.hf, parts, strict=True)
        yield from ((copy, parts[0].clone()) for copy in mapped.copies)  # a file holds nothing twice in one memory

    @property
    def copies(self) -> list[str]:
        """Names of the copies that the folder holds."""
        return [copy for copies in self._copies.values() for copy in copies]

    @staticmethod
    def is_vocabulary(name: str) -> bool:
        """Whether a parameter has one row for each token."""
        return name in ("embedding.word_embeddings.weight", "output_layer.weight")

    @staticmethod
    def divided(mapped: Mapped, whole: Tensor, dim: int | None, size: int) -> list[Tensor]:
        """The parts of a whole parameter: each of gate and up is divided by itself."""
        if dim is None or size == 1:
            return [whole] * size
        if mapped.rule.join == "gate_up" and dim == 0:
            gate, up = (half.chunk(size) for half in whole.chunk(2))
            return [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        return list(whole.chunk(size, dim))

    @staticmethod
    def united(mapped: Mapped, parts: Sequence[Tensor], dim: int | None) -> Tensor:
        """The opposite of `divided`."""
        if dim is None or len(parts) == 1:
            return parts[0]
        if mapped.rule.join == "gate_up" and dim == 0:
            halves = [part.chunk(2) for part in parts]
            return torch.cat([*(half[0] for half in halves), *(half[1] for half in halves)])
        return torch.cat(list(parts), dim)


def _padded(whole: Tensor, rows: int) -> Tensor:
    return torch.cat([whole, whole.new_zeros(rows - len(whole), *whole.shape[1:])])


# ---- In ---------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where Hugging Face's tensors come from."""

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of that shape on the CPU. Raises `UserError` if there is none."""
        ...


class Fresh:
    """Random weights, each made from the seed and its name: the same on every rank and under every layout.

    Norms are ones, biases zeros, all else normal with standard deviation `std`.
    """

    def __init__(self, seed: int, std: float) -> None:
        self._seed, self._std = seed, std

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `Source`."""
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(self._seed << 32 | zlib.crc32(name.encode()))
        return torch.empty(shape).normal_(0.0, self._std, generator=generator)


class Folder:
    """The safetensors files of a Hugging Face folder. Raises `UserError` for a damaged one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._files[path] = self._open(path)
            self._where.update(dict.fromkeys(self._files[path].keys(), path))

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or incomplete: {error}; download the model again") from error

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._where.keys()

    def check(self, table: Table, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Every expected tensor is there in its shape and nothing else, before any is read. Raises `UserError`."""
        check_tensors(self._folder, expected, ignored(table.model))

    def dtype(self, names: Sequence[str]) -> torch.dtype:
        """Of tensors that a parameter is made of, without reading them. Raises `UserError` if they differ in it."""
        found: set[torch.dtype] = {self._files[self._where[name]].get_slice(name)[0:0].dtype for name in names}
        if len(found) > 1:
            raise UserError(
                f"{self._folder}: {', '.join(names)} must be of one type, and are {sorted(map(str, found))}"
            )
        return found.pop()

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `Source`."""
        if name not in self._where:
            raise UserError(f"{self._folder} lacks {name}")
        try:
            tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{self._where[name]}: {name} cannot be read: {error}") from error
        assert tuple(tensor.shape) == shape, "checked before"
        return tensor


def load(chunks: list[nn.Module], table: Table, source: Source) -> None:
    """Fills this rank's parameters, but for a critic's head. Raises `UserError`."""
    with torch.no_grad():
        for own in parameters(chunks):
            if own.new:
                continue
            name = "embedding.word_embeddings.weight" if own.copied else own.name
            mapped = table.find(name)
            shapes = table.shapes(mapped, own.shape)
            tensors = [source.get(hf, shape) for hf, shape in zip(mapped.hf, shapes, strict=True)]
            if own.replica == own.group.rank() == 0:
                check_copies(mapped, tensors, source)
            whole = table.join(mapped, tensors, own.shape[0])
            own.tensor.copy_(table.divided(mapped, whole, own.dim, own.group.size())[own.group.rank()])


def check_copies(mapped: Mapped, tensors: Sequence[Tensor], source: Source) -> None:
    """Refuses copies of a parameter's tensors that are none. Raises `UserError`."""
    for name in mapped.copies:
        if not source.get(name, tuple(tensors[0].shape)).equal(tensors[0]):
            raise UserError(
                f"the tensor {name} is not the same as {mapped.hf[0]}, as it is in models that the trainer knows; "
                "leave mtp_num_layers out"
            )


# ---- Out --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A parameter of the whole model. owner: the lowest rank that puts it together."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: int


class Exporter:
    """Gives the whole model's weights as Hugging Face's tensors. To make one is a collective."""

    def __init__(self, chunks: list[nn.Module], table: Table) -> None:
        self.table = table
        self._own = {own.name: own for own in parameters(chunks) if not (own.copied or own.new)}
        self._rank = dist.get_rank()
        held = [
            Placed(own.name, own.shape, own.tensor.dtype, self._rank)
            for own in self._own.values()
            if own.replica == 0 and own.group.rank() == 0
        ]
        everywhere: list[list[Placed]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everywhere, held)
        placed: dict[str, Placed] = {}
        for one in (one for ranks in everywhere for one in ranks):
            placed.setdefault(one.name, one)
        self._placed = sorted(placed.values(), key=lambda one: order(one.name))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all Hugging Face tensors that the model is made of."""
        return {name: shape for name, shape, _ in self._tensors()}

    def layout(self) -> list[BucketLayout]:
        """The buckets that `buckets` yields."""
        made: list[BucketLayout] = []
        names: list[str] = []
        shapes: list[tuple[int, ...]] = []
        size, dtype = 0, None
        for name, shape, kind in self._tensors():
            more = math.prod(shape) * kind.itemsize
            if names and (size + more > BUCKET_BYTES or kind != dtype):
                made.append(_bucket_layout(names, shapes, dtype))
                names, shapes, size = [], [], 0
            names.append(name)
            shapes.append(shape)
            size, dtype = size + more, kind
        return [*made, _bucket_layout(names, shapes, dtype)]

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        for placed in self._placed:
            mapped = self.table.find(placed.name)
            for name, part in self.table.tensors(mapped, torch.empty(placed.shape, device="meta")):
                yield name, tuple(part.shape), placed.dtype

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one after another; empty tensors on all ranks but 0. A collective."""
        for placed in self._placed:
            mapped = self.table.find(placed.name)
            whole = self._whole(placed, mapped)
            if whole is None:
                yield from ((name, torch.empty(0)) for name in (*mapped.hf, *mapped.copies))
            else:
                yield from self.table.tensors(mapped, whole)

    def _whole(self, placed: Placed, mapped: Mapped) -> Tensor | None:
        """The parameter on rank 0, None on the others."""
        own = self._own.get(placed.name)
        whole = None
        if own is not None and own.replica == 0:
            whole = self._united(own, mapped)
        if placed.owner == 0:
            return whole if self._rank == 0 else None
        if self._rank == placed.owner:
            assert whole is not None
            dist.send(whole.contiguous(), dst=0)
        if self._rank == 0:
            whole = torch.empty(placed.shape, dtype=placed.dtype, device=self._device())
            dist.recv(whole, src=placed.owner)
            return whole
        return None

    def _united(self, own: Local, mapped: Mapped) -> Tensor:
        part = own.tensor.detach()
        if own.dim is None or own.group.size() == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(own.group.size())]
        dist.all_gather(parts, part.contiguous(), group=own.group)
        return self.table.united(mapped, parts, own.dim)

    def _device(self) -> torch.device:
        return next(iter(self._own.values())).tensor.device

    def buckets(self) -> Iterator[Bucket]:
        """Flat buckets as `layout` says; only rank 0's hold bytes. A collective: every rank iterates."""
        tensors = self.tensors()
        for bucket in self.layout():
            parts = [next(tensors)[1] for _ in bucket.names]
            if self._rank:
                yield Bucket(names=bucket.names, shapes=bucket.shapes, flat=torch.empty(0))
            else:
                flat = torch.cat([part.reshape(-1) for part in parts])
                yield Bucket(names=bucket.names, shapes=bucket.shapes, flat=flat)


def _bucket_layout(names: Iterable[str], shapes: Iterable[tuple[int, ...]], dtype: torch.dtype | None) -> BucketLayout:
    return BucketLayout(names=tuple(names), shapes=tuple(shapes), dtype=str(dtype).removeprefix("torch."))


def order(name: str) -> tuple[tuple[int, str], ...]:
    """Layers and experts by number; embedding first, output layer last."""
    first = 0 if name.startswith("embedding.") else 2 if name.startswith("output_layer.") else 1
    numbers = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
    return ((first, ""), *numbers)
