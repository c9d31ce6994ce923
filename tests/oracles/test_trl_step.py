"""A golden optimizer step: the same tiny model, samples and settings through TRL's trainer and through ours.

TRL generates, scores and trains; what it made is taken from it, packed, and trained by ours from the same weights.
Advantages, losses, gradient norms and the updated weights must be the same, over two steps on the same samples, of
which the second has ratios other than 1; in one piece, and with gradients accumulated over TRL's micro-batches of four
samples and over ours of so many tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from miles_core import AdvantageSpec
from miles_core.config.schema import Component, LossSection
from miles_core.roles import TrainerContext, TrainStage
from miles_core.run.advantages import apply_advantage
from miles_core.run.objective import Objective
from miles_core.run.tokenizers import make_tokenizer
from miles_core.run.weights import aggregate
from miles_core.sample import Batch, Sample
from miles_grpo.loss.clipped import clipped
from miles_grpo.options import ClippedLoss, GRPOAdvantage
from miles_torch.options import OptimizerOptions, TrainerOptions
from miles_torch.trainer import TorchTrainer

STEPS = 2
RATE, DECAY, NORM, BETA = 1e-3, 0.1, 0.2, 0.05
EPS = 1e-3
"""Of Adam: so large that gradients near 0 give small updates, else rounding decides their sign."""
SAMPLES = 8
AGGREGATIONS: dict[str, Any] = {"grpo": ("sequence", None), "dapo": ("token", None), "dr_grpo": ("constant", 12)}
MICRO_BATCHES = [(name, count) for name in AGGREGATIONS for count in (1, 2)]
"""TRL's loss and the number of micro-batches that it makes of a batch."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Qwen3 model of 40 thousand parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    fields: dict[str, Any] = make_tokenizer("ascii", folder)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(**shape, **heads, **fields, max_position_embeddings=64, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass
class Made:
    """What TRL made: its micro-batches, in the order of training, and after training the losses and gradient norms of
    each step, and the weights."""

    micro_batches: list[dict[str, torch.Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def column(self, name: str) -> torch.Tensor:
        """Of the samples of the first step, which are those of every step."""
        return torch.cat([micro[name] for micro in self.micro_batches[: len(self.micro_batches) // STEPS]])


def vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between samples."""
    return [sum(letter in "aeiou" for letter in text) - 0.01 * len(text) for text in completions]


@pytest.fixture(scope="module", params=MICRO_BATCHES, ids=lambda param: f"{param[0]}-{param[1]}")
def made(request, trl, model, tmp_path_factory) -> tuple[str, int, Made]:
    """Two steps of TRL on one generation of two prompts with four samples each."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig

    found = Made()
    loss_type, accumulated = request.param

    class Watched(trl.grpo):  # type: ignore[misc]
        def _compute_loss(self, model, inputs):
            found.micro_batches.append({k: value for k, value in inputs.items() if isinstance(value, torch.Tensor)})
            return super()._compute_loss(model, inputs)

    folder = tmp_path_factory.mktemp("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_steps=STEPS,
            num_iterations=STEPS,
            per_device_train_batch_size=SAMPLES // accumulated,
            gradient_accumulation_steps=accumulated,
            num_generations=4,
            max_completion_length=12,
            temperature=1.0,
            loss_type=loss_type,
            scale_rewards="group",
            beta=BETA,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=DECAY,
            adam_epsilon=EPS,
            max_grad_norm=NORM,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        trainer = Watched(
            model=str(model),
            reward_funcs=vowels,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "say something"}, {"prompt": "once more, please"}]),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        trainer.model.float()
        trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    found.losses, found.norms = [log["loss"] for log in logs], [log["grad_norm"] for log in logs]
    found.weights = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    return loss_type, accumulated, found


def samples(made: Made, model: Path) -> list[Sample]:
    """TRL's padded batch as our samples."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids, masks = (made.column(name) for name in ("prompt_ids", "prompt_mask"))
    responses, response_masks = (made.column(name) for name in ("completion_ids", "completion_mask"))
    assert len(ids) == SAMPLES
    found = []
    for row in range(SAMPLES):
        prompt = ids[row][masks[row].bool()].numpy().astype(np.int32)
        response = responses[row][response_masks[row].bool()].numpy().astype(np.int32)
        text = str(tokenizer.decode(response, skip_special_tokens=True))
        (reward,) = vowels([text])
        sample = Sample(
            group=int(prompt.sum()),
            index=row,
            prompt=prompt,
            response=response,
            mask=np.ones(len(response), bool),
            logprobs=np.zeros(len(response), np.float32),
            versions=np.zeros(len(response), np.int32),
            status="completed",
            text=text,
            reward=reward,
        )
        found.append(sample)
    return found


def ours(model: Path, loss_type: str, accumulated: int, made: Made) -> tuple[TorchTrainer, Batch]:
    """Our trainer with the weights that TRL began with, and TRL's samples as our batch."""
    optimizer = OptimizerOptions(
        learning_rate=RATE, betas=(0.9, 0.999), eps=EPS, weight_decay=DECAY, max_grad_norm=NORM
    )
    options = TrainerOptions(optimizer=optimizer, micro_batch_tokens=40 if accumulated > 1 else 16384)
    context = TrainerContext(
        model=model, rank=0, world_size=1, address="", gpus=0, threads=1, seed=0, reference=True, timeout_s=60.0
    )
    trainer = TorchTrainer(options, context)
    trainer.start()
    loss_options = ClippedLoss(kl_coef=BETA, kl_gradient="weighted")
    needs = frozenset({"advantages", "old_logprobs", "ref_logprobs"})
    stage = TrainStage(
        name="golden",
        loss=Objective(loss=clipped),
        loss_options=loss_options,
        entropy=False,
        needs=needs,
        optimizer_steps=STEPS,
        options=options,
    )
    trainer.begin(stage)
    spec = AdvantageSpec(name="grpo", ref="miles_grpo.advantage.grpo:grpo", summary="x")
    advantage = Component(spec=spec, plugin="miles-grpo", options=GRPOAdvantage(eps=1e-4))
    aggregation, length = AGGREGATIONS[loss_type]
    batch = apply_advantage(Batch.pack(samples(made, model)), advantage)
    batch = aggregate(batch, LossSection(name="grpo", aggregation=aggregation, aggregation_length=length), 1)
    columns: dict[str, Any] = {
        "old_logprobs": trainer.logprobs(batch, "policy", 0),
        "ref_logprobs": trainer.logprobs(batch, "reference", 0),
    }
    return trainer, batch.with_columns(**columns)


def test_a_step_is_the_same_as_trls(made, model, tmp_path):
    loss_type, accumulated, theirs = made
    assert len(theirs.micro_batches) == STEPS * accumulated
    before = load_file(model / "model.safetensors")
    trainer, batch = ours(model, loss_type, accumulated, theirs)
    assert (len(trainer._plan(batch, range(SAMPLES))) > 2) == (accumulated > 1)
    per_sample = batch["advantages"][batch.cu_seqlens[1:] - 1]
    np.testing.assert_allclose(per_sample, theirs.column("advantages").numpy(), atol=1e-6)
    assert np.abs(per_sample).min() > 1e-3
    for step in range(STEPS):
        report = trainer.update(batch, step, 1)
        assert report["loss"] == pytest.approx(theirs.losses[step], abs=1e-6)
        assert report["grad_norm"] == pytest.approx(theirs.norms[step], rel=1e-6)
        assert report["grad_norm"] > NORM
    trainer.save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert len(after) == 24
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, theirs.weights[name], atol=1e-6, rtol=0)
        assert (tensor - before[name]).abs().max() > 5e-5
