"""What the critic's tests share: batches with returns, a value loss, and ranks that hold a policy and its critic.

`python critic_kit.py JSON` is one rank of both; rank 0 leaves its results in a folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trainer_kit import make_batch, make_trainer
from trainer_rank import free_address

from miles_core.roles import CriticInputs, LossOutputs, TrainerContext, TrainStage
from miles_core.sample import Batch
from miles_torch.critic import TorchCritic
from miles_torch.options import OptimizerOptions, TrainerOptions

CLIP = 0.3


def value_loss(inputs: CriticInputs, options: Any) -> LossOutputs:
    """Clipped squared error, plus a term over whole sequences."""
    near = inputs.values.clamp(inputs.old_values - CLIP, inputs.old_values + CLIP)
    losses = (inputs.values - inputs.returns).square().maximum((near - inputs.returns).square())
    losses = losses + 0.1 * inputs.segments.spread(inputs.segments.mean(inputs.values))
    return LossOutputs(losses=losses, metrics={"value": inputs.values.detach()})


def valued_batch(seed: int = 0, **how: Any) -> Batch:
    """`make_batch` with the columns that a critic learns from."""
    batch = make_batch(seed, **how)
    returns, values = np.random.default_rng([seed, 1]).standard_normal((2, batch.tokens_total)) * batch["mask"]
    return batch.with_columns(returns=1 + returns, values=values)


def make_critic(
    model: Path, *, rank: int = 0, world_size: int = 1, address: str = "tcp://127.0.0.1:1", **options: Any
) -> TorchCritic:
    """A critic that is ready to train."""
    chosen = TrainerOptions(
        optimizer=OptimizerOptions(learning_rate=1e-3, schedule="cosine", weight_decay=0.1), **options
    )
    context = TrainerContext(
        model=model,
        rank=rank,
        world_size=world_size,
        address=address,
        gpus=0,
        threads=1,
        seed=7,
        reference=False,
        timeout_s=60,
        role="critic",
    )
    critic = TorchCritic(chosen, context)
    critic.start()
    critic.begin(
        TrainStage(
            name="only",
            loss=value_loss,
            loss_options=None,
            entropy=False,
            needs=frozenset({"returns", "values"}),
            optimizer_steps=8,
            options=chosen,
        )
    )
    return critic


def train_both(
    model: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    address: str = "tcp://127.0.0.1:1",
    seeds: list[int],
    options: dict[str, Any] | None = None,
    restore: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    """A policy and its critic in one process, in turn, on the batches of `seeds`. Gives the critic's metrics and, after
    them, its values and the policy's log-probabilities, on rank 0."""
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size, "address": address}
    policy = make_trainer(Path(model), **ranks, **options or {})
    critic = make_critic(Path(model), **ranks, **options or {})
    if restore:
        critic.restore(Path(restore))
    metrics = []
    for seed in seeds:
        batch = valued_batch(seed)
        policy.update(batch, seed, 1)
        metrics.append({**critic.update(batch, seed, 1), "train_seconds": 0.0})
    if save:
        critic.save(Path(save))
    columns = [critic.values(valued_batch(99), 99), policy.logprobs(valued_batch(99), "policy", 99)]
    policy.stop()
    critic.stop()
    return {"metrics": metrics, "columns": columns}


def train_both_on_ranks(out: Path, world_size: int, **run: Any) -> dict[str, Any]:
    """`train_both` on ranks in new processes."""
    out.mkdir(parents=True, exist_ok=True)
    run |= {"address": free_address(), "world_size": world_size}
    ranks = [
        subprocess.Popen([sys.executable, __file__, json.dumps({**run, "rank": rank}), str(out)])
        for rank in range(world_size)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0] * world_size
    return {"metrics": json.loads((out / "metrics.json").read_text()), "columns": list(np.load(out / "columns.npy"))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = train_both(**json.loads(sys.argv[1]))
    if json.loads(sys.argv[1])["rank"] == 0:
        (Path(sys.argv[2]) / "metrics.json").write_text(json.dumps(result["metrics"]))
        np.save(Path(sys.argv[2]) / "columns.npy", np.stack(result["columns"]))
