"""How long the checksum of weights takes, where they are, beside a hash on the CPU: processor seconds a GB, one thread.

    python benchmarks/checksum.py [--gpu] [--rounds 5]

On a GPU it is wall-clock time, from the call until the checksum is known on the CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miles_torch.checksum import checksum

NUMBERS = 2**27
"""Of the bucket, in bfloat16: 256 MiB, as large as they get."""


def hashed(flat: Tensor) -> str:
    """On the CPU."""
    raw: Any = flat.view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(raw).hexdigest()


def summed(flat: Tensor) -> str:
    """Where it is."""
    return checksum(flat, ("weight",), [flat.shape], flat.dtype)


def seconds(work: Callable[[Tensor], str], flat: Tensor, rounds: int) -> list[float]:
    """Of each round after the first."""
    clock = time.perf_counter if flat.is_cuda else time.process_time
    found = []
    for _ in range(rounds + 1):
        started = clock()
        work(flat)
        found.append(clock() - started)
    return found[1:]


def main() -> None:
    """See the head of the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    flat = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)).bfloat16()
    flat = flat.cuda() if arguments.gpu else flat
    for name, work in (("blake2b", hashed), ("checksum", summed)):
        found = [spent / (flat.nbytes / 1e9) for spent in seconds(work, flat, arguments.rounds)]
        print(f"{name}: median {statistics.median(found):.3f} s/GB, {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()
