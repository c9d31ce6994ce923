"""Callbacks on every rank: they are called, and add an auxiliary loss and a metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_kit import make_batch, make_model, run_jobs, torch_trainer, train
from transformers import AutoModelForCausalLM

from miles_core.filler import is_filler

pytestmark = pytest.mark.timeout(900)  # many processes start, on few cores

COEFFICIENT = 0.01
ALONE = {"parallel": {}, "micro_batch_tokens": 24}
PIPELINE = {"parallel": {"pipeline_model_parallel_size": 2}, "micro_batch_tokens": 24}


class Probe:
    """Adds COEFFICIENT * sum of the squares of the last hidden states to the objective; notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.total = 0.0
        self.handle: Any = None

    def model_built(self, context: Any, model: Any) -> None:
        self.heard.append(f"model_built {any(True for _ in model.parameters())}")

    def before_logprobs(self, context: Any, step: int, model: Any) -> None:
        self.heard.append("before_logprobs")

    def before_train_step(self, context: Any, step: int, model: Any, optimizer: Any, batch: Any) -> None:
        self.heard.append("before_train_step")
        norm = model.decoder.final_layernorm
        self.total = 0.0
        self.handle = norm.register_forward_hook(self.listen) if norm is not None else None

    def listen(self, module: Any, inputs: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled() or is_filler():
            return None
        squares = hidden.detach().square().sum()
        self.total += float(squares)
        hidden.register_hook(lambda grad: grad + 2 * COEFFICIENT * hidden.detach())
        return None

    def after_train_step(self, context: Any, step: int, model: Any, optimizer: Any, metrics: dict[str, float]) -> None:
        self.heard.append("after_train_step")
        if self.handle is not None:
            self.handle.remove()
        summed = torch.tensor(self.total)
        torch.distributed.all_reduce(summed)
        metrics["aux"] = float(summed)


def expected(model: Any, batch: Any) -> tuple[float, float]:
    """The sum of squares, and the gradient norm with the auxiliary loss, by transformers and plain autograd."""
    from megatron_kit import policy_loss

    from miles_core.roles import LossInputs, Segments

    total = torch.zeros(())
    squares = torch.zeros(())
    for sample in range(len(batch)):
        start, end = int(batch.cu_seqlens[sample]), int(batch.cu_seqlens[sample + 1])
        tokens = torch.from_numpy(batch["tokens"][start:end]).long()
        trained = torch.from_numpy(batch["mask"][start:end]).nonzero()[:, 0]
        if not len(trained):
            continue
        read = tokens[: int(trained[-1])]
        hidden = model.model(read[None]).last_hidden_state[0]
        table = (model.lm_head(hidden) / batch.temperature).log_softmax(-1)[trained - 1]
        logprobs = table.gather(1, tokens[trained][:, None])[:, 0]

        rows = start + trained.numpy()

        inputs = LossInputs(
            logprobs=logprobs,
            segments=Segments(ids=torch.zeros(len(trained), dtype=torch.int64), count=1),
            advantages=torch.from_numpy(batch["advantages"][rows]).float(),
            entropy=-(table.exp() * table).sum(-1),
        )
        total = total + (torch.from_numpy(batch["weights"][rows]).float() * policy_loss(inputs, None).losses).sum()
        squares = squares + hidden.square().sum()
    (total + COEFFICIENT * squares).backward()
    norm = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None) ** 0.5
    return float(squares.detach()), float(norm)


def test_callbacks_are_heard_on_every_rank_and_add_a_loss_and_a_metric(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    jobs = [
        {"model": str(folder), "options": options, "seeds": [0], "hooks": "test_hooks:Probe"}
        for options in (ALONE, PIPELINE)
    ]
    results = run_jobs(tmp_path / "out", 2, jobs)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    squares, norm = expected(model, make_batch(0, temperature=0.8))
    reference = torch_trainer(folder)
    plain = train(reference, [0])["metrics"][0]
    reference.stop()
    assert abs(plain["grad_norm"] / norm - 1) > 0.01  # the auxiliary loss counts
    for result in results:
        (metrics,) = result["metrics"]
        assert metrics["aux"] == pytest.approx(squares, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert metrics["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        for heard in result["heard"]:
            assert heard[:2] == ["model_built True", "before_logprobs"]
            assert heard.count("before_train_step") == heard.count("after_train_step") == 1
