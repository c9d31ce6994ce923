"""The checksum of a bucket of weights, computed where its bytes are: on a GPU, on the GPU.

Of the bytes as words w_i of 64 bits it is, modulo 2^64,

    sum_i mix(w_i + i g),   mix(x) = m2 * fold(m1 * fold(x)),   fold(x) = x xor (x >> 32)

with odd constants g, m1 and m2. Integers add up to the same in any order, so every device gives the same number. `mix`
has an inverse, so no change within one word goes unnoticed; others do with a probability of about 2^-64. Names, shapes
and dtype are hashed beside it. It tells of faults, not of forgery: for that there is no key in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_STEP, _FIRST, _SECOND = -7046029254386353131, -49064778989728563, -4265267296055464877
"""g, m1 and m2, as signed integers: 2^64 by the golden ratio, and those of MurmurHash3."""

_WORD = 8
_CHUNK_BYTES = {"cpu": 2**19, "cuda": 2**24}
"""What is mixed at once; there is room for three of it. On a CPU that stays in its cache."""


def checksum(flat: Tensor, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> str:
    """32 hexadecimal digits of a bucket: its bytes, and what they are. flat: contiguous, of `dtype` or as bytes."""
    said = repr((list(names), [list(shape) for shape in shapes], str(dtype), flat.nbytes))
    digest = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
    return f"{digest}{_of_bytes(flat.detach().contiguous().view(torch.uint8)) % 2**64:016x}"


def _of_bytes(raw: Tensor) -> int:
    """Of a tensor of bytes [bytes]."""
    size = _CHUNK_BYTES.get(raw.device.type, _CHUNK_BYTES["cpu"])
    steps = torch.arange(size // _WORD, dtype=torch.int64, device=raw.device) * _STEP
    room = torch.empty_like(steps)
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for start in range(0, raw.numel(), size):
        words = _words(raw[start : start + size])
        mixed = torch.add(words, steps[: len(words)], out=room[: len(words)])
        mixed += _signed(start // _WORD * _STEP)
        for factor in (_FIRST, _SECOND):
            halves = mixed.view(torch.int32).view(-1, 2)  # the low half first
            halves[:, 0] ^= halves[:, 1]
            mixed *= factor
        total += mixed.sum()
    return int(total.item())


def _words(raw: Tensor) -> Tensor:
    """Bytes [bytes] as words, the last one filled up with zeros."""
    missing = -raw.numel() % _WORD
    if missing:
        raw = torch.nn.functional.pad(raw, (0, missing))
    elif raw.storage_offset() % _WORD:
        raw = raw.clone()
    return raw.view(torch.int64)


def _signed(number: int) -> int:
    """The same modulo 2^64, as a signed integer of 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
