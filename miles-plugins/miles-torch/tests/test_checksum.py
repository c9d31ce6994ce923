"""The checksum of weights: which differences it sees, and that it is what its definition says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from miles_torch import checksum as module
from miles_torch.checksum import checksum

BYTES = arrays.arrays(np.uint8, st.integers(1, 300))
MASK = 2**64 - 1


def of(raw: Tensor, names: tuple[str, ...] = ("a",), shape: tuple[int, ...] | None = None) -> str:
    """Of bytes that are one tensor."""
    return checksum(raw, names, [shape or (raw.numel(),)], torch.uint8)


def defined(raw: np.ndarray) -> int:
    """The formula, word by word, in Python's own integers."""
    padded = raw.tobytes() + b"\0" * (-len(raw) % 8)
    total = 0
    for place in range(len(padded) // 8):
        mixed = int.from_bytes(padded[8 * place : 8 * place + 8], "little") + place * 0x9E3779B97F4A7C15 & MASK
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            mixed = (mixed ^ mixed >> 32) * factor & MASK
        total = total + mixed & MASK
    return total


@settings(deadline=None)
@given(BYTES, st.sampled_from([8, 64, 2**19]))
def test_it_is_the_defined_sum_whatever_the_size_of_the_chunks(raw: np.ndarray, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", {"cpu": chunk})
        assert of(torch.from_numpy(raw))[16:] == f"{defined(raw):016x}"


@settings(deadline=None)
@given(BYTES, st.data())
def test_a_flipped_bit_is_seen(raw: np.ndarray, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, 8 * len(raw) - 1))
    other = raw.copy()
    other[place // 8] ^= 1 << place % 8
    assert of(torch.from_numpy(other)) != of(torch.from_numpy(raw))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=100), st.integers(1, 8), st.data())
def test_elements_and_blocks_in_another_order_are_seen(values: list[int], size: int, data: st.DataObject) -> None:
    """Blocks of as many elements as a tensor of two bytes an element may have."""
    blocks = np.repeat(np.array(values, np.uint16), size).reshape(-1, size)
    order = data.draw(st.permutations(range(len(blocks))))
    before, after = (torch.from_numpy(found.copy()).view(torch.uint8).reshape(-1) for found in (blocks, blocks[order]))
    assert (of(before) == of(after)) == torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeros_that_are_missing_or_too_many_and_other_names_shapes_and_dtypes_are_seen(dtype: torch.dtype) -> None:
    flat = torch.zeros(24, dtype=dtype)
    wholes = [
        checksum(flat, ("a", "b"), [(2, 4), (16,)], dtype),
        checksum(flat, ("b", "a"), [(2, 4), (16,)], dtype),
        checksum(flat, ("a", "b"), [(4, 2), (16,)], dtype),
        checksum(flat, ("a", "b"), [(2, 4), (16,)], torch.float16),
        checksum(flat[:-1], ("a", "b"), [(2, 4), (16,)], dtype),
        checksum(torch.zeros(32, dtype=dtype), ("a", "b"), [(2, 4), (16,)], dtype),
    ]
    assert len(set(wholes)) == len(wholes)
    assert checksum(flat.view(torch.uint8), ["a", "b"], [[2, 4], [16]], dtype) == wholes[0]


def test_where_in_memory_the_bytes_are_makes_no_difference() -> None:
    whole = torch.arange(1000, dtype=torch.int16).view(torch.bfloat16)
    for start in range(5):
        part = whole[start : start + 901]
        assert checksum(part, ("a",), [(901,)], part.dtype) == checksum(part.clone(), ("a",), [(901,)], part.dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU")
def test_a_gpu_gives_the_same() -> None:
    flat = torch.randn(5_000_001, generator=torch.Generator().manual_seed(0)).bfloat16()
    known = checksum(flat, ("a",), [flat.shape], flat.dtype)
    assert checksum(flat.cuda(), ("a",), [flat.shape], flat.dtype) == known
