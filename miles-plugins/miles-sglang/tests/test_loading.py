"""Buckets get into a model as its own loader would put them, whether the loader works or its copies are made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miles_sglang.loading import Part, load

SHAPES = {"q": (4, 3), "k": (2, 3), "v": (2, 3), "down": (3, 10), "norm": (3,), "head": (5, 3)}


class Model(nn.Module):
    """As SGLang's: a rank's part of the weights, some of them joined, with a loader. after: done at its end."""

    def __init__(self, after: Callable[[Model], object] = lambda model: None) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(8, 3))
        self.down = nn.Parameter(torch.zeros(3, 5))
        self.norm = nn.Parameter(torch.zeros(3, dtype=torch.float32))
        self.after, self.calls = after, 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.calls += 1
        places = {"q": slice(0, 4), "k": slice(4, 6), "v": slice(6, 8)}
        with torch.no_grad():
            for name, weight in weights:
                if name in places:
                    self.qkv.data[places[name]].copy_(weight)
                elif name == "down":  # split over ranks along its columns
                    self.down.data.copy_(weight.narrow(1, 5, 5))
                elif name == "norm":
                    self.norm.data.copy_(weight)
        self.after(self)


def bucket(dtype: torch.dtype, seed: int) -> tuple[Tensor, list[Part], dict[str, Tensor]]:
    """Bytes, parts, and the tensors themselves."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    parts, place = [], 0
    for name, shape in SHAPES.items():
        parts.append(Part(name, shape, dtype, place))
        place += math.prod(shape) * dtype.itemsize
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).view(torch.uint8), parts, tensors


def loaded(model: Model, dtype: torch.dtype, seed: int) -> Model:
    """A model of its own that has loaded the same by its loader; all of the given one's tensors equal its."""
    flat, parts, tensors = bucket(dtype, seed)
    load(model, flat, parts)
    other = Model(model.after)
    other.load_weights(tensors.items())
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loader_that_only_copies_works_once(dtype: torch.dtype) -> None:
    model = Model()
    for seed in range(3):
        loaded(model, dtype, seed)
    assert model.calls == 1


@pytest.mark.parametrize(
    "after",
    [
        lambda model: model.norm.data.mul_(2.0),
        lambda model: setattr(model, "transposed", model.down.data.t().contiguous()),
        lambda model: model.down.data.copy_(model.down.data.flip(0)),
        lambda model: model.norm.data[0].item(),
    ],
    ids=["scales", "keeps a copy", "copies within", "looks at values"],
)
def test_a_loader_that_does_more_works_every_time(after: Any) -> None:
    model = Model(after)
    for seed in range(3):
        loaded(model, torch.float32, seed)
    assert model.calls == 3


def test_what_is_changed_behind_the_operations_is_noticed() -> None:
    """As a kernel of its own would, which no operation of PyTorch tells of."""
    model = Model(lambda model: model.norm.data.numpy().__imul__(2))
    for seed in range(2):
        loaded(model, torch.float32, seed)
    assert model.calls == 2


def test_a_model_whose_memory_has_moved_is_looked_at_again() -> None:
    model = Model()
    loaded(model, torch.float32, 0)
    model.qkv.data = model.qkv.data.clone()
    loaded(model, torch.float32, 1)
    assert model.calls == 2


def test_buckets_of_other_tensors_go_their_own_ways() -> None:
    model = Model()
    flat, parts, tensors = bucket(torch.float32, 0)
    load(model, flat, parts)
    load(model, flat[: parts[2].start], parts[:2])
    flat, _, tensors = bucket(torch.float32, 1)
    load(model, flat[: parts[2].start], parts[:2])
    assert model.calls == 2
    assert torch.equal(model.qkv.data[:6], torch.cat([tensors["q"], tensors["k"]]))
    assert not torch.equal(model.qkv.data[6:], tensors["v"])
