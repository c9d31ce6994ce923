"""What the trainer's tests share: a tiny model, random batches, a loss, and a plain reference of the objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from miles_core.roles import LossInputs, LossOutputs, TrainerContext, TrainStage
from miles_core.sample import Batch, Sample
from miles_torch.options import OptimizerOptions, TrainerOptions
from miles_torch.trainer import TorchTrainer

torch.set_num_threads(1)
VOCABULARY = 97


def tiny_model(folder: Path, **changes: Any) -> Path:
    """A folder with a Qwen3 config and a tokenizer, without weights."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # far from uniform, so that mistakes show
        "architectures": ["Qwen3ForCausalLM"],
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    Qwen3Config(**{**values, **changes}).save_pretrained(folder)
    names = {"<end>": 0, **{str(token): token for token in range(1, VOCABULARY)}}
    words = Tokenizer(WordLevel(names, unk_token="<end>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    return folder


def make_batch(
    seed: int = 0, groups: int = 4, samples: int = 3, minibatches: int = 1, temperature: float = 1.0, holes: bool = True
) -> Batch:
    """Groups with one prompt each and responses of 1 to 12 tokens; with holes, some tokens are not trained and one
    sample has none that is."""
    rng = np.random.default_rng(seed)
    made = []
    for group in range(groups):
        prompt = rng.integers(1, VOCABULARY, rng.integers(1, 9)).astype(np.int32)
        for index in range(samples):
            size = int(rng.integers(1, 13))
            mask = rng.random(size) > 0.2 if holes else np.ones(size, np.bool_)
            if holes and group == 0 and index == 0:
                mask[:] = False
            made.append(
                Sample(
                    group=group,
                    index=index,
                    prompt=prompt,
                    response=rng.integers(1, VOCABULARY, size).astype(np.int32),
                    mask=mask,
                    logprobs=-4 + rng.random(size).astype(np.float32),
                    versions=np.zeros(size, np.int32),
                    status="completed",
                    text="",
                    reward=float(rng.random()),
                )
            )
    batch = Batch.pack(made, temperature=temperature)
    numbers = np.arange(len(made)) * minibatches // len(made)
    return batch.with_samples(minibatch=numbers.astype(np.int32)).with_columns(
        weights=np.where(batch["mask"], rng.random(batch.tokens_total), 0) / max(1, batch["mask"].sum()),
        advantages=np.where(batch["mask"], rng.standard_normal(batch.tokens_total), 0),
    )


def policy_loss(inputs: LossInputs, options: Any) -> LossOutputs:
    """A policy gradient with an entropy bonus if there is an entropy, and a term over whole sequences."""
    assert inputs.advantages is not None
    old = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    difference = inputs.logprobs - old
    losses = -difference.exp() * inputs.advantages
    losses = losses + 0.1 * inputs.segments.spread(inputs.segments.mean(inputs.logprobs))
    if inputs.entropy is not None:
        losses = losses - 0.3 * inputs.entropy
    return LossOutputs(losses=losses, metrics={"ppo_kl": -difference.detach()})


def make_trainer(
    model: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    address: str = "tcp://127.0.0.1:1",
    reference: bool = False,
    entropy: bool = False,
    hooks: Any = None,
    loss: Any = policy_loss,
    optimizer: OptimizerOptions | None = None,
    needs: frozenset[str] = frozenset({"advantages", "old_logprobs"}),
    **options: Any,
) -> TorchTrainer:
    """A trainer that is ready to train."""
    chosen = TrainerOptions(
        optimizer=optimizer or OptimizerOptions(learning_rate=1e-3, schedule="cosine", weight_decay=0.1), **options
    )
    context = TrainerContext(
        model=model,
        rank=rank,
        world_size=world_size,
        address=address,
        gpus=0,
        threads=1,
        seed=7,
        reference=reference,
        timeout_s=60,
        hooks=hooks,
    )
    trainer = TorchTrainer(chosen, context)
    trainer.start()
    trainer.begin(
        TrainStage(
            name="only",
            loss=loss,
            loss_options=None,
            entropy=entropy,
            needs=needs,
            optimizer_steps=8,
            options=chosen,
        )
    )
    return trainer


def plain_model(folder: Path, weights: dict[str, torch.Tensor]) -> Any:
    """transformers' own model with the given weights, in its default attention implementation."""
    config = AutoConfig.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


def exported(trainer: TorchTrainer) -> dict[str, torch.Tensor]:
    """The policy's weights by name."""
    return {name: tensor for bucket in trainer.export() for name, tensor in bucket.tensors().items()}


def alone(model: Any, batch: Batch, sample: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray[Any, Any]]:
    """Of one sample by itself: log-probabilities and entropies of its trained tokens, and their places."""
    start, end = batch.cu_seqlens[sample], batch.cu_seqlens[sample + 1]
    tokens = torch.from_numpy(batch["tokens"][start:end]).long()
    rows = start + np.flatnonzero(batch["mask"][start:end])
    table = (model(tokens[None]).logits[0, :-1] / batch.temperature).log_softmax(-1)
    picked = table.gather(1, tokens[1:, None])[:, 0]
    entropy = -(table.exp() * table).sum(-1)
    return picked[rows - start - 1], entropy[rows - start - 1], rows


def plain_objective(model: Any, batch: Batch, *, entropy: bool = False) -> torch.Tensor:
    """sum(weights * loss) of `policy_loss`, sample by sample, written without segments, packing or micro-batches."""
    total = torch.zeros(())
    for sample in range(len(batch)):
        logprobs, entropies, rows = alone(model, batch, sample)
        if not len(rows):
            continue
        gains = torch.from_numpy(batch["advantages"][rows]).float()
        weights = torch.from_numpy(batch["weights"][rows]).float()
        losses = -(logprobs - logprobs.detach()).exp() * gains + 0.1 * logprobs.mean()
        total = total + (weights * (losses - 0.3 * entropies if entropy else losses)).sum()
    return total


def norm(model: Any) -> float:
    """The gradient norm."""
    return float(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None) ** 0.5)
