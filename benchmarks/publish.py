"""How long the weights take from a trainer to an engine.

Random weights of the shape of Qwen3-0.6B in bfloat16, 1.19 GB.

    python benchmarks/publish.py [--trainer torch|megatron] [--rounds 20] [--verify] [--cpu-tiny]
    python benchmarks/publish.py --engine sglang [--colocated [--sleep]] [and the same]

With the engine `torch`, each on a GPU of its own, a transfer begins when the trainer starts to export and ends when the
engine's GPU has copied the last tensor to its place. A bare broadcast of as many bytes by NCCL follows.

With the engine `sglang` it begins when the trainer starts to export, and the server to pause, and ends when the server
goes on. What one token takes then is said too. Each has a GPU of its own (NCCL), or both share one (`--colocated`,
CUDA's handles); with `--sleep` there are also the times of taking turns and the memory of the GPU in use at each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from miles_core.roles import EngineContext, TrainerContext
from miles_core.sample import Request, Sampling

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
SERVER = {"mem_fraction_static": 0.3, "disable_cuda_graph": True, "disable_prefill_cuda_graph": True}
"""Of SGLang on a GPU: what starts soonest."""


def free_port() -> int:
    """One that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def build_trainer(arguments: argparse.Namespace, folder: Path, gpus: int) -> Any:
    """A started trainer of one rank, in bfloat16 on a GPU."""
    name = arguments.trainer
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
        verify=arguments.verify,
        layout="colocated" if arguments.colocated else "disaggregated",
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


def sender_of(arguments: argparse.Namespace) -> Any:
    """The class of the trainer's side of the sync."""
    if arguments.engine == "torch":
        from miles_torch.sync import TorchSender

        return TorchSender
    from miles_sglang import handles, sync

    return handles.Sender if arguments.colocated else sync.Sender


def send(arguments: argparse.Namespace, folder: str, gpus: int, pipe: Any) -> None:
    """The trainer's process: does as it is told, and says when, and how much of the GPU is in use then."""
    trainer = build_trainer(arguments, Path(folder), gpus)
    sender = sender_of(arguments)(trainer.context, 1)
    pipe.send((sender.open(), trainer.layout()))
    sender.connect()
    while order := pipe.recv():
        started = time.time()
        if order == "publish":
            sender.send(trainer.export())
        elif order != "look":
            getattr(trainer, order)()
        done = time.time()
        free, total = torch.cuda.mem_get_info() if gpus else (0, 0)
        pipe.send((started, done, total - free))
    sender.close()
    trainer.stop()
    if gpus and arguments.engine == "torch":
        bare(0, pipe.recv(), torch.device("cuda", 0), arguments.rounds)


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
        pipe.send("publish")
        receiver.receive(model.load)
        if gpus:
            torch.cuda.synchronize()
        arrived = time.time()
        started, returned, _ = pipe.recv()
        seconds.append(max(arrived, returned) - started)
    pipe.send(None)
    model.finish_load()
    receiver.close()
    say(layout, seconds)
    if gpus:
        port = free_port()
        pipe.send(port)
        plain = bare(1, port, device, rounds)[2:]
        print(f"a plain broadcast of 1.19 GB: median {statistics.median(plain) * 1e3:.2f} ms")


def say(layout: Any, seconds: list[float]) -> None:
    """What the transfers took."""
    shapes = [(shape, bucket.dtype) for bucket in layout for shape in bucket.shapes]
    size = sum(int(np.prod(shape)) * getattr(torch, dtype).itemsize for shape, dtype in shapes)
    kept = seconds[2:]
    print(
        f"{size / 1e9:.2f} GB in {len(layout)} buckets: median {statistics.median(kept) * 1e3:.1f} ms, "
        f"best {min(kept) * 1e3:.1f} ms, worst {max(kept) * 1e3:.1f} ms; the first {seconds[0] * 1e3:.0f} ms"
    )


# ---- The engine `sglang` --------------------------------------------------------------------------------------------


async def serve(arguments: argparse.Namespace, folder: Path, gpus: int, pipe: Any, trainer: Any) -> None:
    """The process of the engine `sglang`, which starts first: prints the result."""
    from miles_sglang import handles, sync
    from miles_sglang.engine import SglangEngine
    from miles_sglang.options import EngineOptions

    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0" if arguments.colocated else "1"
    context = EngineContext(
        model=folder,
        index=0,
        gpus=gpus,
        threads=1,
        dtype="bfloat16" if gpus else "float32",
        max_tokens=128,
        seed=0,
        folder=folder,
        verify=arguments.verify,
        sleeps=arguments.sleep,
    )
    engine = SglangEngine(EngineOptions(server={"skip_tokenizer_init": True, **(SERVER if gpus else {})}), context)
    try:
        await engine.start()
        trainer.start()
        address, layout = await asyncio.to_thread(pipe.recv)
        receiver = (handles if arguments.colocated else sync).Receiver(context, 1, address, layout)
        await asyncio.to_thread(receiver.connect)
        await transfers(engine, receiver, layout, arguments.rounds, pipe)
        if arguments.sleep:
            await turns(engine, receiver, pipe)
        pipe.send(None)
        await asyncio.to_thread(receiver.close)
    finally:
        await engine.stop()


async def transfers(engine: Any, receiver: Any, layout: Any, rounds: int, pipe: Any) -> None:
    """As a run publishes, into a server that has nothing to do."""
    seconds, tokens = [], []
    for version in range(rounds):
        pipe.send("publish")
        await engine.pause("in-place")
        await asyncio.to_thread(receiver.receive, engine.load)
        engine.set_version(version)
        await engine.resume()
        on = time.time()
        started, _, _ = await asyncio.to_thread(pipe.recv)
        seconds.append(on - started)
        tokens.append(await timed(lambda: one_token(engine)))
    say(layout, seconds)
    print(f"then one token of a prompt of 16: median {statistics.median(tokens[2:]) * 1e3:.1f} ms")


async def one_token(engine: Any) -> None:
    """The shortest that can be asked for."""
    request = Request(id="", tokens=np.arange(16, dtype=np.int32), sampling=Sampling(max_new_tokens=1), seeds=(0,))
    async for _ in engine.generate([replace(request, id="one")]):
        pass


async def timed(work: Callable[[], Awaitable[None]]) -> float:
    """Seconds."""
    started = time.perf_counter()
    await work()
    return time.perf_counter() - started


async def turns(engine: Any, receiver: Any, pipe: Any) -> None:
    """The turns of five steps of a run, the first of which is left out of the medians."""

    async def tell(order: str) -> int:
        pipe.send(order)
        used: int = (await asyncio.to_thread(pipe.recv))[2]
        return used

    async def publish() -> None:
        pipe.send("publish")
        await asyncio.to_thread(receiver.receive, engine.load)
        engine.set_version(100)
        await asyncio.to_thread(pipe.recv)

    steps: list[tuple[str, Callable[[], Awaitable[Any]]]] = [
        ("engine sleeps", engine.sleep),
        ("trainer wakes", lambda: tell("wake")),
        ("engine's weights wake", lambda: engine.wake("weights")),
        ("transfer", publish),
        ("trainer sleeps", lambda: tell("sleep")),
        ("engine wakes", lambda: engine.wake("all")),
        ("one token", lambda: one_token(engine)),
    ]
    await tell("sleep")
    seconds: dict[str, list[float]] = {name: [] for name, _ in steps}
    used: dict[str, int] = {}
    for _ in range(5):
        for name, work in steps:
            seconds[name].append(await timed(work))
            used[name] = await tell("look")
    for name, _ in steps:
        print(f"{name:22} {statistics.median(seconds[name][1:]) * 1e3:7.1f} ms, then {used[name] / 1e9:6.1f} GB in use")


def main() -> None:
    """See the head of the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trainer", choices=("torch", "megatron"), default="torch")
    parser.add_argument("--engine", choices=("torch", "sglang"), default="torch")
    parser.add_argument("--colocated", action="store_true", help="on one GPU, with the engine sglang")
    parser.add_argument("--sleep", action="store_true", help="with --colocated: also what taking turns takes")
    parser.add_argument("--verify", action="store_true", help="compare checksums, which takes time")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cpu-tiny", action="store_true", help="a tiny model on the CPU: only to see that it runs")
    arguments = parser.parse_args()
    gpus = 0 if arguments.cpu_tiny else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({**SHAPE, **(TINY if arguments.cpu_tiny else {})}))
        processes = multiprocessing.get_context("spawn")
        own, other = processes.Pipe()
        trainer = processes.Process(target=send, args=(arguments, name, gpus, other))
        try:
            if arguments.engine == "sglang":
                asyncio.run(serve(arguments, folder, gpus, own, trainer))
            else:
                trainer.start()
                receive(folder, gpus, arguments.rounds, own)
            trainer.join(60)
        finally:
            if trainer.pid is not None:
                trainer.kill()


if __name__ == "__main__":
    main()
