"""What the tests share: tiny models of each family, batches, and training runs in this process or on several ranks.

`main` runs the jobs of a folder on several ranks: one job after another, each with a process group of its own, so that
many layouts cost one start. Ranks are forked when everything is imported, which takes longer than most jobs. Rank 0
leaves the results in the folder.
"""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from miles_core.lasting import lasting_imports
from miles_core.roles import CriticInputs, LossInputs, LossOutputs, TrainerContext, TrainStage
from miles_core.sample import Batch, Sample
from miles_core.testing.models import randomised, save_model
from miles_torch.model import config_of as transformers_config

VOCABULARY = 97
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.95, "adam_eps": 1e-3, "clip_grad": 1.0}
"""With an epsilon that keeps Adam from blowing up what float32 rounds: a gradient's error comes into a weight as it is,
and so does a gradient of the wrong size."""

_SHARED: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "tie_word_embeddings": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "tie_word_embeddings": False,
    },
    "glm4-moe": {
        "model_type": "glm4_moe",
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
    },
}
MODELS = {
    **MODELS,
    "kimi-k2": {
        **MODELS["deepseek-v3"],
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "rope_theta": 50000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 32.0, "original_max_position_embeddings": 8, "beta_fast": 1.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
}  # fmt: skip
"""Name -> fields of config.json over the shared ones."""


def config_of(name: str) -> dict[str, Any]:
    """Its config.json."""
    return {**_SHARED, **MODELS[name]}


def make_model(folder: Path, name: str = "qwen3", **changes: Any) -> Path:
    """A Hugging Face folder with random weights that are far from uniform, further predicting layers among them."""
    fields = {**config_of(name), **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    generator = torch.Generator().manual_seed(5)
    model = randomised(transformers_config(folder), generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1, generator=generator)
    save_model(model, folder)
    if "architectures" in fields:  # transformers writes the names that it knows
        (folder / "config.json").write_text(json.dumps(fields))
    if fields.get("num_nextn_predict_layers"):
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | _further(tensors, fields, generator), folder / "model.safetensors", {"format": "pt"})
    return folder


def by_transformers(folder: Path) -> Any:
    """The model of a Hugging Face folder, in float32."""
    config = transformers_config(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def _further(tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any], generator: Any) -> dict[str, torch.Tensor]:
    """Layers like the last one with what they have besides, as DeepSeek V3's and GLM's folders hold them."""
    last, width = fields["num_hidden_layers"], fields["hidden_size"]
    found = {}
    for number in range(last, last + fields["num_nextn_predict_layers"]):
        own = f"model.layers.{number}."
        for name, tensor in tensors.items():
            if name.startswith(f"model.layers.{last - 1}."):
                noise = torch.randn(tensor.shape, generator=generator) * 0.05
                found[own + name.split(".", 3)[3]] = tensor + noise
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            found[f"{own}{norm}.weight"] = torch.rand(width, generator=generator) + 0.5
        found[f"{own}eh_proj.weight"] = torch.randn(width, 2 * width, generator=generator) * (2 * width) ** -0.5
        found[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        found[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return found


def make_batch(
    seed: int = 0, groups: int = 4, samples: int = 3, minibatches: int = 1, temperature: float = 1.0
) -> Batch:
    """Groups with one prompt each and responses of 1 to 12 tokens, some of them not trained."""
    rng = np.random.default_rng(seed)
    made = []
    for group in range(groups):
        prompt = rng.integers(1, VOCABULARY, rng.integers(1, 9)).astype(np.int32)
        for index in range(samples):
            size = int(rng.integers(1, 13))
            mask = rng.random(size) > 0.2
            if group == index == 0:
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
    """A policy gradient with an entropy bonus, and a term over whole sequences."""
    assert inputs.advantages is not None
    old = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    difference = inputs.logprobs - old
    losses = -difference.exp() * inputs.advantages
    losses = losses + 0.1 * inputs.segments.spread(inputs.segments.mean(inputs.logprobs))
    if inputs.entropy is not None:
        losses = losses - 0.3 * inputs.entropy
    return LossOutputs(losses=losses, metrics={"ppo_kl": -difference.detach(), "loss_max": losses.detach()})


def free_address() -> str:
    """An address on this machine that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def stage(options: Any, steps: int = 8) -> TrainStage:
    """A stage with the loss above."""
    needs = frozenset({"advantages", "old_logprobs"})
    return TrainStage(
        name="only",
        loss=policy_loss,
        loss_options=None,
        entropy=True,
        needs=needs,
        optimizer_steps=steps,
        options=options,
    )


def context(model: Path, *, rank: int = 0, world_size: int = 1, address: str = "", hooks: Any = None) -> TrainerContext:
    """Of one rank on a CPU."""
    return TrainerContext(
        model=model,
        rank=rank,
        world_size=world_size,
        address=address or free_address(),
        gpus=0,
        threads=1,
        seed=7,
        reference=True,
        timeout_s=60,
        hooks=hooks,
    )


def make_trainer(model: Path, options: Mapping[str, Any] | None = None, **where: Any) -> Any:
    """A trainer `megatron` that is ready to train."""
    from miles_megatron.options import TrainerOptions
    from miles_megatron.start import make_trainer as make

    chosen = TrainerOptions(**{"optimizer": OPTIMIZER, **(options or {})})
    trainer = make(chosen, context(model, **where))
    trainer.start()
    trainer.begin(stage(chosen))
    return trainer


def torch_trainer(model: Path) -> Any:
    """A trainer `torch` with the same optimizer: the reference."""
    from miles_torch.trainer import TorchTrainer

    chosen = _torch_options()
    trainer = TorchTrainer(chosen, context(model))
    trainer.start()
    trainer.begin(stage(chosen))
    return trainer


def _torch_options() -> Any:
    from miles_torch.options import OptimizerOptions, TrainerOptions

    optimizer = OptimizerOptions(learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-3, max_grad_norm=1.0)
    return TrainerOptions(optimizer=optimizer)


def value_loss(inputs: CriticInputs, options: Any) -> LossOutputs:
    """A squared error that is clipped, and a term over whole sequences."""
    near = inputs.values.clamp(inputs.old_values - 0.3, inputs.old_values + 0.3)
    losses = (inputs.values - inputs.returns).square().maximum((near - inputs.returns).square())
    losses = losses + 0.1 * inputs.segments.spread(inputs.segments.mean(inputs.values))
    return LossOutputs(losses=losses, metrics={"value": inputs.values.detach()})


def make_critic(model: Path, options: Mapping[str, Any] | None = None, **where: Any) -> Any:
    """A critic of the trainer `megatron` that is ready to train, in the process of a policy if there is one."""
    from miles_megatron.options import TrainerOptions
    from miles_megatron.start import make_critic as make

    chosen = TrainerOptions(**{"optimizer": OPTIMIZER, **(options or {})})
    return _begun_critic(make, chosen, context(model, **where))


def torch_critic(model: Path) -> Any:
    """The same of the trainer `torch`: the reference."""
    from miles_torch.critic import TorchCritic

    return _begun_critic(TorchCritic, _torch_options(), context(model))


def _begun_critic(make: Any, options: Any, where: TrainerContext) -> Any:
    critic = make(options, replace(where, role="critic", reference=False))
    critic.start()
    needs = frozenset({"returns", "values"})
    critic.begin(replace(stage(options), loss=value_loss, entropy=False, needs=needs))
    return critic


def train_critic(critic: Any, seeds: Sequence[int]) -> dict[str, Any]:
    """Values before, metrics of each batch, values after."""
    before = critic.values(make_batch(99), 0)
    metrics = []
    for seed in seeds:
        batch = make_batch(seed)
        returns, values = np.random.default_rng([seed, 1]).standard_normal((2, batch.tokens_total)) * batch["mask"]
        metrics.append(dict(critic.update(batch.with_columns(returns=1 + returns, values=values), seed, 1)))
    return {"before": before, "metrics": metrics, "after": critic.values(make_batch(99), 9)}


def exported(trainer: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The policy's weights by name; nothing on all ranks but 0."""
    weights = {}
    for bucket in trainer.export():
        if len(bucket.flat):
            parts = torch.split(bucket.flat, [int(np.prod(shape)) for shape in bucket.shapes])
            for name, part, shape in zip(bucket.names, parts, bucket.shapes, strict=True):
                weights[name] = part.detach().numpy().copy().reshape(shape)
    return weights


def one_by_one(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Experts by themselves, as in files; transformers holds them together."""
    found: dict[str, Any] = {}
    for name, tensor in weights.items():
        for number, expert in enumerate(tensor) if ".experts." in name and tensor.ndim == 3 else ():
            base = name.rpartition(".")[0] + f".{number}"
            if name.endswith("gate_up_proj"):
                gate, up = np.split(expert, 2)
                found |= {f"{base}.gate_proj.weight": gate, f"{base}.up_proj.weight": up}
            else:
                found[f"{base}.down_proj.weight"] = expert
        if ".experts." not in name or tensor.ndim != 3:
            found[name] = tensor
    return found


def train(trainer: Any, seeds: Sequence[int], minibatches: int = 1) -> dict[str, Any]:
    """Log-probabilities before, metrics of each batch, weights and the reference's log-probabilities after."""
    probe = make_batch(99)
    before = trainer.logprobs(probe, "policy", 0)
    metrics = []
    for seed in seeds:
        batch = make_batch(seed, minibatches=minibatches, temperature=0.8)
        if minibatches > 1:  # any values do, as long as every rank has the same
            batch = batch.with_columns(old_logprobs=batch["rollout_logprobs"] - 1)
        metrics.append(dict(trainer.update(batch, seed, 1)))
    after = [trainer.logprobs(probe, which, 9) for which in ("policy", "reference")]
    return {"before": before, "metrics": metrics, "after": after, "weights": exported(trainer)}


def run_job(job: Mapping[str, Any], **where: Any) -> Any:
    """One job: {"model", "options", "seeds", "minibatches", "restore", "save", "meanwhile",
    "pretrained", "hooks", "critic"}. meanwhile: seeds to train on while the checkpoint is written. critic: seeds of a
    critic in the same processes, which is trained after the policy, and which `restore` and `save` are then for.

    Gives {"refused"} if the trainer is.
    Or {"function"}: see `run_functions`."""
    from miles_core.errors import RunError, UserError

    if "function" in job:
        return _call(job["function"], **where)
    hooks = resolve_name(job["hooks"])() if "hooks" in job else None
    try:
        trainer = make_trainer(Path(job["model"]), job.get("options"), hooks=hooks, **where)
    except (UserError, RunError) as error:
        if dist.is_initialized():
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
        return {"refused": str(error)}
    try:
        if "critic" in job:
            return _critic_job(job, **where) | {"policy": train(trainer, job.get("seeds", ()))}
        if job.get("restore"):
            trainer.restore(Path(job["restore"]))
        result = train(trainer, job.get("seeds", ()), job.get("minibatches", 1))
        if job.get("save"):
            written = trainer.save(Path(job["save"]))
            if job.get("meanwhile"):
                result["meanwhile"] = train(trainer, job["meanwhile"])
            assert written is None or written(True)
        if job.get("pretrained"):
            trainer.save_pretrained(Path(job["pretrained"]))
        if hooks is not None:
            everywhere: list[Any] = [None] * where["world_size"]
            dist.all_gather_object(everywhere, hooks.heard)
            result["heard"] = everywhere
        return result
    finally:
        trainer.stop()


def _critic_job(job: Mapping[str, Any], **where: Any) -> dict[str, Any]:
    critic = make_critic(Path(job["model"]), job.get("options"), **where)
    if job.get("restore"):
        critic.restore(Path(job["restore"]))
    result = train_critic(critic, job["critic"])
    if job.get("save"):
        written = critic.save(Path(job["save"]))
        assert written is None or written(True)
    return result


_MAIN = """
from miles_core.lasting import lasting_imports
with lasting_imports():
    import megatron_kit
megatron_kit.main()
"""


def run_jobs(out: Path, world_size: int, jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Each of `jobs` on `world_size` ranks in new processes."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "jobs.json").write_text(
        json.dumps([{**job, "address": f"file://{out}/meeting-{number}"} for number, job in enumerate(jobs)])
    )
    # Not as a script: what a rank spawns, to write a checkpoint, would import that again.
    command = [sys.executable, "-c", _MAIN, str(out), str(world_size)]
    ranks = subprocess.Popen(command, cwd=Path(__file__).parent, start_new_session=True)
    try:
        assert ranks.wait(timeout=800) == 0, "a rank failed; its traceback is in the output"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)
        ranks.wait()
    results: list[Any] = pickle.loads((out / "results.pkl").read_bytes())
    return results


def run_functions(out: Path, world_size: int, reference: str) -> Any:
    """What "module:function" of this folder, called with the rank, gives on rank 0 of several that form a group."""
    return run_jobs(out, world_size, [{"function": reference}])[0]


def _call(reference: str, rank: int, world_size: int, address: str) -> Any:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    try:
        return resolve_name(reference)(rank)
    finally:
        dist.destroy_process_group()


def main() -> None:
    """See the head of the module. Ends when a rank has failed; then the others wait for it in vain, and are killed."""
    from miles_megatron import start

    folder, world_size = Path(sys.argv[1]), int(sys.argv[2])
    jobs = json.loads((folder / "jobs.json").read_text())
    if any("model" in job for job in jobs):
        with lasting_imports():
            start.prepare()
            import_module("miles_megatron.critic")  # with all that a job needs
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(folder, jobs, rank, world_size)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    waiting: dict[Any, Any] = {rank.sentinel: rank for rank in ranks}
    while waiting:
        for ended in multiprocessing.connection.wait(list(waiting)):
            rank = waiting.pop(ended)
            rank.join()
            if rank.exitcode:
                os._exit(1)


def _rank(folder: Path, jobs: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    results = [run_job(job, rank=rank, world_size=world_size, address=job["address"]) for job in jobs]
    if rank == 0:
        (folder / "results.pkl").write_bytes(pickle.dumps(results))
