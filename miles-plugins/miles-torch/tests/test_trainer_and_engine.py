"""The trainer and the engine together: what one exports, the other generates with, at the same log-probabilities."""

from __future__ import annotations

import asyncio

import numpy as np
from trainer_kit import make_batch, make_trainer, tiny_model

from miles_core.roles import EngineContext
from miles_core.sample import Batch, Request, Sample, Sampling
from miles_torch.engine import TorchEngine
from miles_torch.engine_options import EngineOptions


async def generate(folder, buckets) -> list[Sample]:
    """Eight samples of two prompts, with the weights of `buckets`."""
    context = EngineContext(
        model=folder, index=0, gpus=0, threads=1, dtype="float32", max_tokens=64, seed=0, folder=folder
    )
    engine = TorchEngine(EngineOptions(), context)
    await engine.start()
    await engine.pause("drain")
    for bucket in buckets:
        engine.load(bucket.names, list(bucket.tensors().values()))
    engine.set_version(1)
    await engine.resume()
    sampling = Sampling(temperature=0.9, max_new_tokens=12)
    prompts = [np.array(tokens, np.int32) for tokens in ([5, 6, 7], [9, 3, 4, 8, 2])]
    requests = [
        Request(id=str(number), tokens=prompt, sampling=sampling, seeds=(1, 2, 3, 4))
        for number, prompt in enumerate(prompts)
    ]
    samples = []
    async for name, completions in engine.generate(requests):
        for index, made in enumerate(completions):
            samples.append(
                Sample(
                    group=int(name),
                    index=index,
                    prompt=prompts[int(name)],
                    response=made.tokens,
                    mask=np.ones(len(made.tokens), np.bool_),
                    logprobs=made.logprobs,
                    versions=made.versions,
                    status=made.status,
                    text="",
                    reward=0.0,
                )
            )
    await engine.stop()
    return samples


def test_the_engine_samples_from_the_policy_that_the_trainer_exports(tmp_path):
    folder = tiny_model(tmp_path)
    trainer = make_trainer(folder)
    trainer.update(make_batch(), 0, 1)
    batch = Batch.pack(asyncio.run(generate(folder, trainer.export())), temperature=0.9)
    column = trainer.logprobs(batch, "policy", 1)
    assert batch["mask"].sum() > 40
    np.testing.assert_allclose(batch["rollout_logprobs"][batch["mask"]], column[batch["mask"]], atol=5e-6)
