"""How long the weights take from a trainer to an engine `torch`, each on a GPU of its own, over NCCL.

Random weights of the shape of Qwen3-0.6B in bfloat16, 1.19 GB. A transfer begins when the trainer starts to export and
ends when the engine's GPU has copied the last tensor to its place. A bare broadcast of as many bytes by NCCL follows.

    python benchmarks/publish.py [--trainer torch|megatron] [--rounds 20] [--cpu-tiny]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from miles_core.roles import EngineContext, TrainerContext

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}


def free_port() -> int:
    """One that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def build_trainer(name: str, folder: Path, gpus: int) -> Any:
    """A started trainer of one rank, in bfloat16 on a GPU."""
    context = TrainerContext(
        model=folder,
        rank=0,
        world_size=1,
        address=f"tcp://127.0.0.1:{free_port()}",
        gpus=gpus,
        threads=4,
        seed=0,
        reference=False,
        timeout_s=120,
    )
    trainer: Any
    if name == "megatron":
        from miles_megatron.options import TrainerOptions as MegatronOptions
        from miles_megatron.start import make_trainer

        trainer = make_trainer(MegatronOptions(parallel={"bf16": bool(gpus)}), context)
    else:
        from miles_torch.options import TrainerOptions
        from miles_torch.trainer import TorchTrainer

        trainer = TorchTrainer(TrainerOptions(dtype="bfloat16" if gpus else "float32"), context)
    trainer.start()
    return trainer


def send(name: str, folder: str, gpus: int, rounds: int, pipe: Any) -> None:
    """The trainer's process."""
    from miles_torch.sync import TorchSender

    trainer = build_trainer(name, Path(folder), gpus)
    sender = TorchSender(trainer.context, 1)
    pipe.send((sender.open(), trainer.layout()))
    sender.connect()
    for _ in range(rounds):
        pipe.recv()
        started = time.time()
        sender.send(trainer.export())
        pipe.send((started, time.time()))
    sender.close()
    trainer.stop()
    if gpus:
        bare(0, pipe.recv(), torch.device("cuda", 0), rounds)


def bare(rank: int, port: int, device: torch.device, rounds: int) -> list[float]:
    """Seconds of plain broadcasts of 1.19 GB."""
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    flat = torch.empty(596_049_920, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        dist.broadcast(flat, 0)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    dist.destroy_process_group()
    return seconds


def receive(folder: Path, gpus: int, rounds: int, pipe: Any) -> None:
    """The engine's process: prints the result."""
    from miles_torch.engine_model import EngineModel
    from miles_torch.sync import TorchReceiver

    device = torch.device("cuda", 1) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    model = EngineModel(folder, device=device, dtype=torch.bfloat16 if gpus else torch.float32, max_tokens=128)
    context = EngineContext(
        model=folder, index=0, gpus=gpus, threads=4, dtype="bfloat16", max_tokens=128, seed=0, folder=folder
    )
    address, layout = pipe.recv()
    receiver = TorchReceiver(context, 1, address, layout)
    receiver.connect()
    seconds = []
    for _ in range(rounds):
        pipe.send("go")
        receiver.receive(model.load)
        if gpus:
            torch.cuda.synchronize()
        arrived = time.time()
        started, returned = pipe.recv()
        seconds.append(max(arrived, returned) - started)
    model.finish_load()
    receiver.close()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.module.parameters())
    kept = seconds[2:]
    print(
        f"{size / 1e9:.2f} GB in {len(layout)} buckets: median {statistics.median(kept) * 1e3:.1f} ms, "
        f"best {min(kept) * 1e3:.1f} ms, worst {max(kept) * 1e3:.1f} ms; the first {seconds[0] * 1e3:.0f} ms"
    )
    if gpus:
        port = free_port()
        pipe.send(port)
        plain = bare(1, port, device, rounds)[2:]
        print(f"a plain broadcast of 1.19 GB: median {statistics.median(plain) * 1e3:.2f} ms")


def main() -> None:
    """See the head of the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trainer", choices=("torch", "megatron"), default="torch")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cpu-tiny", action="store_true", help="a tiny model on the CPU: only to see that it runs")
    arguments = parser.parse_args()
    gpus = 0 if arguments.cpu_tiny else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({**SHAPE, **(TINY if arguments.cpu_tiny else {})}))
        processes = multiprocessing.get_context("spawn")
        own, other = processes.Pipe()
        trainer = processes.Process(target=send, args=(arguments.trainer, name, gpus, arguments.rounds, other))
        trainer.start()
        try:
            receive(folder, gpus, arguments.rounds, own)
            trainer.join(60)
        finally:
            trainer.kill()


if __name__ == "__main__":
    main()
