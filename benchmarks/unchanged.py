"""How much of what is published has not changed since the last time: what sending only that could save.

    miles train RECIPE checkpoint.every=1 checkpoint.keep=1000 name=unchanged
    python benchmarks/unchanged.py runs/unchanged/checkpoints

Reads the checkpoints of a run of trainer torch, which hold the policy in float32, as they are published: in bfloat16.
Each is compared with the one before it: which share of the bytes is in elements, in blocks of some sizes and in whole
tensors that have the same bits. Says beside it how long comparing takes on one thread, and how large a difference would
be that names each changed element by four bytes, as a share of all.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

BLOCKS = (4096, 65536, 1048576)
"""Bytes."""


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The policy of a checkpoint as it is published, each tensor flat, as integers of the same bits."""
    found = {}
    for path in sorted((checkpoint / "trainer").glob("weights-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 — it is no mapping
                found[name] = file.get_tensor(name).bfloat16().reshape(-1).view(torch.int16)
    return found


def untouched(same: Tensor, block_bytes: int) -> int:
    """Elements that lie in blocks in which every element is the same, of a tensor [elements]."""
    size = block_bytes // 2
    blocks = torch.nn.functional.pad(same, (0, -len(same) % size), value=True).view(-1, size).all(dim=1)
    return int(same[blocks.repeat_interleave(size)[: len(same)]].sum())


def compare(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, float]:
    """Shares of all bytes, and how long comparing takes."""
    kept: Counter[str] = Counter()
    elements, seconds = 0, 0.0
    for name, tensor in new.items():
        started = time.perf_counter()
        same = tensor == old[name]
        count = int(same.sum())
        seconds += time.perf_counter() - started
        elements += len(same)
        kept["single elements"] += count
        for size in BLOCKS:
            kept[f"blocks of {size // 1024} KiB"] += untouched(same, size)
        kept["whole tensors"] += count if count == len(same) else 0
    return {
        **{f"unchanged in {what}": number / elements for what, number in kept.items()},
        "size of a difference by elements": 3 * (1 - kept["single elements"] / elements),
        "seconds to compare a GB": seconds / (2e-9 * elements),
    }


def main() -> None:
    """Compares, and prints a line for each checkpoint but the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, help="the folder of a run's checkpoints")
    folders = sorted(parser.parse_args().checkpoints.glob("step-*"))
    torch.set_num_threads(1)
    old = weights(folders[0])
    for before, after in pairwise(folders):
        new = weights(after)
        found = compare(old, new)
        print(f"{before.name} -> {after.name}: " + ", ".join(f"{what} {number:.4f}" for what, number in found.items()))
        old = new


if __name__ == "__main__":
    main()
