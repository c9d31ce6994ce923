"""Layers that predict further tokens, and what balances experts, against plain PyTorch on transformers' layers.

Each sample runs alone through transformers' model, on which a few lines compute the layers that transformers leaves
out, and the auxiliary losses. Every layout and micro-batch size must give the same loss, gradient norm, further cross
entropy, auxiliary losses, and biases that choose experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_kit import (
    by_transformers,
    free_address,
    make_batch,
    make_model,
    make_trainer,
    policy_loss,
    run_job,
    run_jobs,
)
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from miles_core.errors import UserError
from miles_core.roles import LossInputs, Segments

pytestmark = pytest.mark.timeout(900)  # many processes start, on few cores

LAYERS = {"deepseek-v3": 2, "glm4-moe": 1}
AUXILIARY = {
    "mtp_loss_scaling_factor": 0.3,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.05,
    "moe_z_loss_coeff": 0.02,
    "moe_router_bias_update_rate": 0.25,
}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dp2 in small micro-batches": ("deepseek-v3", {"micro_batch_tokens": 24}),
    "tp2 sp": ("deepseek-v3", {"parallel": TENSOR}),
    "pp2 in small micro-batches": (
        "deepseek-v3", {"parallel": {"pipeline_model_parallel_size": 2}, "micro_batch_tokens": 24},
    ),
    "cp2 recomputed": ("deepseek-v3", {"parallel": {"context_parallel_size": 2}, "transformer": RECOMPUTED}),
    "ep2 recomputed in small micro-batches": (
        "deepseek-v3",
        {"parallel": {"expert_model_parallel_size": 2}, "transformer": RECOMPUTED, "micro_batch_tokens": 24},
    ),
    "glm ep2": ("glm4-moe", {"parallel": {"expert_model_parallel_size": 2}}),
    "glm tp2 sp": ("glm4-moe", {"parallel": TENSOR}),
}  # fmt: skip


def options_of(model: str, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """With every auxiliary loss on."""
    own = {**AUXILIARY, "mtp_num_layers": LAYERS[model], **options.get("transformer", {}), **more}
    return {**options, "transformer": own}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: make_model(base / name, name, num_nextn_predict_layers=count) for name, count in LAYERS.items()}


@pytest.fixture(scope="module")
def trained(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Layout -> what came of an optimizer step under it."""
    jobs = [
        {"model": str(folders[model]), "options": options_of(model, options), "seeds": [0]}
        for model, options in LAYOUTS.values()
    ]
    return dict(zip(LAYOUTS, run_jobs(tmp_path_factory.mktemp("out"), 2, jobs), strict=True))


class Oracle(nn.Module):
    """A model of transformers, and layers of its own kind that predict further tokens."""

    def __init__(self, folder: Path, layers: int) -> None:
        super().__init__()
        self.model = by_transformers(folder)
        config, tensors = self.model.config, load_file(folder / "model.safetensors")
        self.first, width = config.num_hidden_layers, config.hidden_size
        self.further: Any = nn.ModuleList()
        kind = type(self.model.model.layers[-1])
        for number in range(self.first, self.first + layers):
            norms = {name: nn.RMSNorm(width, eps=config.rms_norm_eps) for name in ("enorm", "hnorm", "norm")}
            parts = {"layer": kind(config, self.first - 1), "eh_proj": nn.Linear(2 * width, width, bias=False), **norms}
            own = nn.ModuleDict(parts)
            prefix = f"model.layers.{number}."
            found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for name in ("enorm", "hnorm", "eh_proj"):
                own[name].load_state_dict({"weight": found.pop(f"{name}.weight")})
            own["norm"].load_state_dict({"weight": found.pop("shared_head.norm.weight")})
            assert found.pop("embed_tokens.weight").equal(self.model.model.embed_tokens.weight)
            assert found.pop("shared_head.head.weight").equal(self.model.lm_head.weight)
            own["layer"].load_state_dict(_together(found))
            self.further.append(own)
        self.mixtures = [layer.mlp for layer in self.layers() if hasattr(layer.mlp, "gate")]
        self.seen: dict[int, Any] = {}
        for number, mixture in enumerate(self.mixtures):
            mixture.experts.register_forward_pre_hook(lambda _, inputs, n=number: self.seen.update({n: inputs[1]}))

    def layers(self) -> list[Any]:
        return [*self.model.model.layers, *(own["layer"] for own in self.further)]

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """[T] -> logits of the model, and of each layer further, [T, V]."""
        body, positions = self.model.model, torch.arange(len(tokens))[None]
        states = [body(tokens[None]).last_hidden_state]
        for depth, own in enumerate(self.further, 1):
            ahead = torch.cat([tokens[depth:], tokens.new_zeros(depth)])[None]
            joined = torch.cat([own["enorm"](body.embed_tokens(ahead)), own["hnorm"](states[-1])], -1)
            hidden = own["eh_proj"](joined)
            hidden = own["layer"](hidden, position_embeddings=body.rotary_emb(hidden, positions))
            states.append(own["norm"](hidden))
        return [self.model.lm_head(each)[0] for each in states]


def _together(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as transformers holds them."""
    count = len({name.split(".")[2] for name in found if name.startswith("mlp.experts.")})
    own = [
        {part: found.pop(f"mlp.experts.{n}.{part}_proj.weight") for part in ("gate", "up", "down")}
        for n in range(count)
    ]
    found["mlp.experts.gate_up_proj"] = torch.stack([torch.cat([each["gate"], each["up"]]) for each in own])
    found["mlp.experts.down_proj"] = torch.stack([each["down"] for each in own])
    return found


def expected(folder: Path, layers: int) -> dict[str, Any]:
    """Of one batch: loss, gradient norm, further cross entropy, auxiliary losses, and the biases after the step."""
    oracle, batch = Oracle(folder, layers), make_batch(0, temperature=0.8)
    logits_of: dict[int, torch.Tensor] = {}
    for number, mixture in enumerate(oracle.mixtures):
        mixture.gate.register_forward_hook(
            lambda _, __, out, n=number: logits_of.update({n: out.view(-1, out.shape[-1])})
        )
    samples = [read for sample in range(len(batch)) if (read := _read(batch, sample)) is not None]
    total = sum(len(tokens) for tokens, _, _ in samples)
    main, auxiliary, ahead = torch.zeros(()), torch.zeros(()), []
    sums = {"moe/seq_aux_loss": 0.0, "moe/z_loss": 0.0}
    counts = torch.zeros(len(oracle.mixtures), 8)
    for tokens, trained, rows in samples:
        own, *further = oracle(tokens)
        all_tokens = torch.cat([tokens, torch.from_numpy(batch["tokens"][rows[-1:]]).long()])
        weights = torch.from_numpy(batch["weights"][rows]).float()
        main = main + (weights * _losses(own / batch.temperature, all_tokens, trained, batch, rows)).sum()
        for depth, logits in enumerate(further, 1):
            kept = trained > depth
            entropy = F.cross_entropy(logits[trained[kept] - 1 - depth], all_tokens[trained[kept]], reduction="none")
            auxiliary = auxiliary + 0.3 / layers * (weights[kept] * entropy).sum()
            ahead += entropy.tolist()
        for number in range(len(oracle.mixtures)):
            inside = number < len(oracle.mixtures) - layers
            seen = slice(0, len(tokens) if inside else max(0, len(tokens) - layers))
            routed = logits_of[number][seen]
            counts[number] += F.one_hot(oracle.seen[number][seen], 8).sum((0, 1))
            z_loss = routed.logsumexp(-1).square().sum() / total
            balance = _balance(routed, 4) / len(samples)
            auxiliary = auxiliary + 0.02 * z_loss + 0.05 * balance
            sums["moe/z_loss"] += float(z_loss.detach()) / len(oracle.mixtures)
            sums["moe/seq_aux_loss"] += float(balance.detach()) / len(oracle.mixtures)
    (main + auxiliary).backward()
    squares = sum(p.grad.double().square().sum() for p in oracle.parameters() if p.grad is not None)
    biases = [
        mixture.gate.e_score_correction_bias + 0.25 * torch.sign(own.mean() - own)
        for mixture, own in zip(oracle.mixtures, counts, strict=True)
    ]
    metrics = {
        "loss": float(main.detach()),
        "grad_norm": float(squares**0.5),
        "mtp/cross_entropy": np.mean(ahead),
        **sums,
    }
    return {"metrics": metrics, "biases": [bias.numpy() for bias in biases]}


def _read(batch: Any, sample: int) -> tuple[torch.Tensor, torch.Tensor, Any] | None:
    """What is read of a sample, its trained places, and their rows in the batch."""
    start, end = int(batch.cu_seqlens[sample]), int(batch.cu_seqlens[sample + 1])
    trained = torch.from_numpy(batch["mask"][start:end]).nonzero()[:, 0]
    if not len(trained):
        return None
    return torch.from_numpy(batch["tokens"][start:end]).long()[: int(trained[-1])], trained, start + trained.numpy()


def _losses(logits: torch.Tensor, tokens: torch.Tensor, trained: torch.Tensor, batch: Any, rows: Any) -> torch.Tensor:
    table = logits.log_softmax(-1)[trained - 1]
    inputs = LossInputs(
        logprobs=table.gather(1, tokens[trained][:, None])[:, 0],
        segments=Segments(ids=torch.zeros(len(trained), dtype=torch.int64), count=1),
        advantages=torch.from_numpy(batch["advantages"][rows]).float(),
        entropy=-(table.exp() * table).sum(-1),
    )
    return policy_loss(inputs, None).losses


def _balance(logits: torch.Tensor, chosen: int) -> torch.Tensor:
    """DeepSeek V3's sequence-wise balance loss."""
    if not len(logits):
        return torch.zeros(())
    scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    fractions = F.one_hot(scores.topk(chosen).indices, scores.shape[1]).sum((0, 1)) / (chosen * len(scores))
    return scores.shape[1] * (fractions * scores.mean(0)).sum()


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: expected(folders[name], layers) for name, layers in LAYERS.items()}


def same(result: Any, reference: dict[str, Any], folder: Path) -> None:
    (metrics,) = result["metrics"]
    for name, value in reference["metrics"].items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    biases = [value for name, value in result["weights"].items() if name.endswith("e_score_correction_bias")]
    for found, value in zip(biases, reference["biases"], strict=True):
        np.testing.assert_allclose(found, value, atol=1e-6)
    assert result["weights"].keys() == load_file(folder / "model.safetensors").keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auxiliary_losses_do_not_depend_on_the_layout(
    trained: dict[str, Any], references: dict[str, Any], folders: dict[str, Path], layout: str
) -> None:
    model = LAYOUTS[layout][0]
    same(trained[layout], references[model], folders[model])


def test_one_rank_is_the_same_and_its_weights_come_back_bit_for_bit(
    references: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["deepseek-v3"]
    where = {"rank": 0, "world_size": 1, "address": free_address()}
    job = {"model": str(folder), "options": options_of("deepseek-v3", {}), "pretrained": str(tmp_path / "same")}
    assert run_job(job, **where)["metrics"] == []
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "same"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    step = {"model": str(folder), "options": options_of("deepseek-v3", {}), "seeds": [0]}
    same(run_job(step, **{**where, "address": free_address()}), references["deepseek-v3"], folder)


def test_training_goes_on_from_a_checkpoint_bit_for_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    job = {"model": str(folders["deepseek-v3"]), "options": options_of("deepseek-v3", {})}
    place = str(tmp_path / "trainer")
    found = [
        run_job({**job, **more}, rank=0, world_size=1, address=free_address())
        for more in ({"seeds": [0, 1]}, {"seeds": [0], "save": place}, {"seeds": [1], "restore": place})
    ]
    whole, again = found[0], found[2]
    told = [{name: value for name, value in each["metrics"][-1].items() if name != "train_seconds"} for each in found]
    assert told[0] == told[2] != told[1]
    assert all(np.array_equal(whole["weights"][name], again["weights"][name]) for name in whole["weights"])
    assert any(".eh_proj." in name for name in whole["weights"])


def test_detached_layers_leave_the_model_as_it_would_be_without_them(folders: dict[str, Path]) -> None:
    folder = folders["glm4-moe"]
    found = []
    for more in ({"mtp_num_layers": 1, "mtp_detach_heads": True}, {}):
        trainer = make_trainer(folder, {"transformer": more})
        before = {name: value.detach().clone() for name, value in trainer._bare.named_parameters()}
        metrics = trainer.update(make_batch(0), 0, 1)
        moved = {name: (p.detach() - before[name]).abs().max() for name, p in trainer._bare.named_parameters()}
        found.append((metrics, {n: p.detach().clone() for n, p in trainer._bare.named_parameters()}, moved))
        trainer.stop()
    (own, weights, moved), (reference, without, _) = found
    assert own["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-6)
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in without.items())
    assert all(value > 0 for name, value in moved.items() if name.startswith("mtp.") and "experts" not in name)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mtp_num_layers": 2}, "mtp_num_layers is 2, but .* says that it has 1 layers"),
        ({"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}, "'aux_loss' depends on what is in"),
        ({"moe_aux_loss_coeff": 0.1}, "'none' does not use it; set .* = 'seq_aux_loss'"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor cannot be set: it drops tokens"),
        ({"moe_input_jitter_eps": 0.1}, "moe_input_jitter_eps cannot be set"),
    ],
)
def test_what_would_depend_on_micro_batches_or_is_not_there_is_refused(
    folders: dict[str, Path], options: dict[str, Any], error: str
) -> None:
    with pytest.raises(UserError, match=error):
        make_trainer(folders["glm4-moe"], {"transformer": options})


def test_a_head_that_is_no_copy_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = make_model(tmp_path / "model", "glm4-moe", num_nextn_predict_layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.shared_head.head.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors")
    job = {"model": str(folder), "options": {"transformer": {"mtp_num_layers": 1}}}
    refused = run_job(job, rank=0, world_size=1, address=free_address())["refused"]
    assert "shared_head.head.weight is not the same as lm_head.weight" in refused
    make_trainer(folder).stop()  # without them they are ignored
