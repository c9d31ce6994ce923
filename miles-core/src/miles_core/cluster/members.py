"""The long-lived processes of a run, as classes that Ray makes actors of: trainer ranks, engines, the collector.

Each writes what it prints to its own log, loads exactly the driver's plugins, and builds its component.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ray

from miles_core.cluster.engine_pool import EnginePool
from miles_core.config.schema import Plan
from miles_core.lifecycle import Role, lifecycle
from miles_core.plugins import load_exact, resolve
from miles_core.roles import BucketLayout, EngineContext, PauseMode, TrainerContext
from miles_core.run.collector import Collected, Collector
from miles_core.run.objective import train_stage
from miles_core.sample import Batch, Completion, Request
from miles_core.specs import CallbackSpec, WeightSyncSpec


def _enter(log: Path, plan: Plan) -> None:
    """The first thing in every member: its output goes to its log, its plugins are the driver's."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    faulthandler.enable()
    load_exact(plan.plugin_set)


def hooks_of(plan: Plan, role: Role) -> Any:
    """The lifecycle hooks of the run's callbacks in one process role."""
    chosen = [one for one in plan.callbacks if isinstance(one.spec, CallbackSpec) and role in one.spec.runs_on]
    return lifecycle(role, [resolve(one.spec.ref)(one.options) for one in chosen])


def _own_host(plan: Plan) -> str:
    """Where other members reach this one: loopback unless the cluster has several machines."""
    return "127.0.0.1" if plan.cluster.address is None else str(ray.util.get_node_ip_address())


def _sync_spec(plan: Plan) -> WeightSyncSpec:
    assert plan.sync is not None
    assert isinstance(plan.sync.spec, WeightSyncSpec)
    return plan.sync.spec


class TrainerMember:
    """One trainer rank."""

    def __init__(self, log: Path, plan: Plan, rank: int) -> None:
        _enter(log, plan)
        self.plan, self.rank = plan, rank
        self.sender: Any = None

    def address(self) -> str:
        """A free meeting point for the trainer ranks, on rank 0's machine."""
        host = _own_host(self.plan)
        with socket.create_server((host, 0)) as listener:
            return f"tcp://{host}:{listener.getsockname()[1]}"

    def start(self, address: str, model: Path, reference: bool) -> None:
        """Builds the trainer and its model."""
        section = self.plan.trainer_section
        self.context = TrainerContext(
            model=model,
            rank=self.rank,
            world_size=section.world_size,
            address=address,
            gpus=int(section.gpus > 0),
            threads=section.threads,
            seed=self.plan.seed,
            reference=reference,
            timeout_s=self.plan.cluster.deadline_s,
            hooks=hooks_of(self.plan, "trainer"),
        )
        self.trainer = resolve(self.plan.trainer.spec.ref)(self.plan.stages[0].trainer.options, self.context)
        self.trainer.start()

    def begin(self, stage: int) -> None:
        """A stage starts."""
        self.trainer.begin(train_stage(self.plan.stages[stage]))

    def open_sync(self, engines: int) -> tuple[str, Sequence[BucketLayout]]:
        """Builds the sender. The meeting point (of rank 0) and what will be sent."""
        self.sender = resolve(_sync_spec(self.plan).ref)(self.context, engines)
        return self.sender.open() if self.rank == 0 else "", self.trainer.layout()

    def connect_sync(self) -> None:
        """Meets the engines."""
        self.sender.connect()

    def publish(self, version: int) -> None:
        """Sends the weights; returns when every engine has them."""
        self.sender.send(self.trainer.export())
        self.context.hooks.weights_published(context=self.context, version=version)

    def logprobs(self, batch: Batch, which: Literal["policy", "reference"], step: int) -> Any:
        """A token column, from rank 0."""
        return self.trainer.logprobs(batch, which, step)

    def update(self, batch: Batch, step: int, passes: int) -> Mapping[str, float]:
        """Trains on a batch."""
        metrics: Mapping[str, float] = self.trainer.update(batch, step, passes)
        return metrics

    def save(self, folder: Path) -> None:
        """Everything that `restore` needs."""
        self.trainer.save(folder)

    def restore(self, folder: Path) -> None:
        """The opposite of `save`."""
        self.trainer.restore(folder)

    def save_pretrained(self, folder: Path) -> None:
        """The policy for transformers."""
        self.trainer.save_pretrained(folder)


Finished = tuple[str, list[Completion] | BaseException]
"""A request's id, and its completions or why there are none."""


class EngineMember:
    """One engine. Requests come by `submit`, results leave by `take`, many in one answer."""

    def __init__(self, log: Path, plan: Plan, index: int, model: Path) -> None:
        _enter(log, plan)
        assert plan.engine is not None
        assert plan.engine_section is not None
        self.plan = plan
        self.context = EngineContext(
            model=model,
            index=index,
            gpus=plan.engine_section.gpus,
            threads=plan.engine_section.threads,
            dtype=plan.model.dtype,
            max_tokens=plan.model.max_tokens,
            seed=plan.seed,
            folder=log.parent,
            hooks=hooks_of(plan, "rollout"),
        )
        self.engine = resolve(plan.engine.spec.ref)(plan.engine.options, self.context)
        self.finished: list[Finished] = []
        self.news = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Brings the engine up."""
        await self.engine.start()

    async def connect_sync(self, address: str, engines: int, layout: Sequence[BucketLayout]) -> None:
        """Meets the trainer."""
        self.receiver = resolve(_sync_spec(self.plan).receiver)(self.context, engines, address, layout)
        await asyncio.to_thread(self.receiver.connect)

    async def receive(self, version: int) -> None:
        """Receives the weights of `version` while generation is paused."""
        mode: PauseMode = self.plan.publish.mode
        await self.engine.pause(mode)
        await asyncio.to_thread(self.receiver.receive, self.engine.load)
        self.engine.set_version(version)
        await self.engine.resume()

    async def submit(self, requests: Sequence[Request]) -> None:
        """Requests that enter the engine together."""
        task = asyncio.create_task(self._run(requests))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(self, requests: Sequence[Request]) -> None:
        left = {request.id for request in requests}
        try:
            async for name, completions in self.engine.generate(requests):
                left.discard(name)
                self.finished.append((name, completions))
                self.news.set()
        except Exception as error:
            self.finished.extend((name, error) for name in left)
            self.news.set()

    async def take(self, patience_s: float) -> tuple[list[Finished], float]:
        """What has finished since the last call, after waiting up to `patience_s` for something; and the seconds that
        the engine has computed in all."""
        if not self.finished:
            self.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), patience_s)
        taken, self.finished = self.finished, []
        return taken, self.engine.busy_seconds


class CollectorMember:
    """The collector: data, rollouts, rewards, filters, advantages."""

    def __init__(self, log: Path, plan: Plan, model: Path, engines: Sequence[tuple[str, Any, Path]]) -> None:
        _enter(log, plan)
        self.pool = EnginePool(engines, plan.cluster.deadline_s) if engines else None
        self.collector = Collector(plan, model, self.pool)

    async def begin(self, stage: int, step: int, folder: Path | None) -> None:
        """A stage starts, or goes on from a checkpoint."""
        await self.collector.begin(stage, step, folder)

    async def next_batch(self, step: int, patience_s: float) -> tuple[Any, Collected] | None:
        """A reference to the batch of `step` and what there is to say of it; None if it is not complete yet."""
        collected = await self.collector.next_batch(step, patience_s)
        return None if collected is None else (ray.put(collected.batch), collected.without_batch())

    async def finish(self, batch: Batch, names: Sequence[str], *columns: Any) -> tuple[Any, dict[str, float]]:
        """The batch with the trainer's columns, its advantages and its weights."""
        finished, metrics = await asyncio.to_thread(
            self.collector.finish, batch, dict(zip(names, columns, strict=True))
        )
        return ray.put(finished), metrics

    async def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of an evaluation."""
        return await self.collector.evaluate(step)

    async def save(self, folder: Path) -> None:
        """Everything that `begin` needs to go on."""
        self.collector.save(folder)

    async def close(self) -> None:
        """Ends the reward workers."""
        self.collector.close()
