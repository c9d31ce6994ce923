"""Training runs that tests compare, in this process or spread over trainer ranks in processes of their own.

`python trainer_rank.py JSON` is one rank; rank 0 leaves each run's results in a folder.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def free_address() -> str:
    """An address on this machine that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def train(
    model: str,
    *,
    address: str = "tcp://127.0.0.1:1",
    rank: int = 0,
    world_size: int = 1,
    seeds: list[int],
    minibatches: int = 1,
    options: dict[str, Any] | None = None,
    restore: str | None = None,
    save: str | None = None,
    pretrained: str | None = None,
    poison: int | None = None,
) -> dict[str, Any]:
    """Trains on the batches of `seeds`. Gives the metrics of each, and the weights and log-probabilities after them
    (on rank 0). poison: a token whose advantage is not a number in the first batch, to see the error."""
    from trainer_kit import exported, make_batch, make_trainer

    from miles_core.errors import RunError

    trainer = make_trainer(
        Path(model), rank=rank, world_size=world_size, address=address, reference=True, entropy=True, **options or {}
    )
    if restore:
        trainer.restore(Path(restore))
    metrics: list[dict[str, object]] = []
    for seed in seeds:
        batch = make_batch(seed, minibatches=minibatches)
        if minibatches > 1:  # any values do, as long as every rank has the same
            batch = batch.with_columns(old_logprobs=batch["rollout_logprobs"] - 1)
        if poison is not None:
            gains = np.where(np.arange(batch.tokens_total) == poison, np.nan, batch["advantages"])
            try:
                trainer.update(batch.with_columns(advantages=gains), seed, 1)
            except RunError as error:
                metrics.append({"error": str(error)})
            continue
        metrics.append(dict(trainer.update(batch, seed, 1)))
    logprobs = [trainer.logprobs(make_batch(99), which, 99) for which in ("policy", "reference")]
    if save:
        trainer.save(Path(save))
    if pretrained:
        trainer.save_pretrained(Path(pretrained))
    if rank:
        assert logprobs == [None, None]
        assert not any(len(bucket.flat) for bucket in trainer.export())
    weights = exported(trainer) if rank == 0 else {}
    trainer.stop()
    return {"metrics": metrics, "logprobs": logprobs, "weights": {name: t.clone() for name, t in weights.items()}}


def train_on_ranks(out: Path, world_size: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of `runs` (arguments of `train`), one after another, on ranks in new processes."""
    from safetensors.torch import load_file

    out.mkdir(parents=True, exist_ok=True)
    runs = [{**run, "address": free_address(), "world_size": world_size} for run in runs]
    ranks = [
        subprocess.Popen([sys.executable, __file__, json.dumps([{**run, "rank": rank} for run in runs]), str(out)])
        for rank in range(world_size)
    ]
    codes = [rank.wait(timeout=200) for rank in ranks]
    assert codes == [0] * world_size
    return [
        {
            "metrics": json.loads((out / f"{number}.json").read_text()),
            "logprobs": np.load(out / f"{number}.npy"),
            "weights": load_file(out / f"{number}.safetensors"),
        }
        for number in range(len(runs))
    ]


def main() -> None:
    """See the head of the module."""
    from safetensors.torch import save_file

    for number, run in enumerate(json.loads(sys.argv[1])):
        result = train(**run)
        if run["rank"] == 0:
            out = Path(sys.argv[2])
            (out / f"{number}.json").write_text(json.dumps(result["metrics"]))
            np.save(out / f"{number}.npy", np.stack(result["logprobs"]))
            save_file(result["weights"], out / f"{number}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
