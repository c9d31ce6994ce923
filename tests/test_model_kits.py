"""The contract rules that need a model: each finds the mistake that it is there for, in a component of miles-torch."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from miles_core.declarations import declaration_kinds
from miles_core.plugins import Plugin, discover
from miles_core.roles import Bucket, PauseMode, TrainStage
from miles_core.sample import Batch, Completion, Request
from miles_core.specs import EngineSpec, ModelSpec, Spec, TrainerSpec, WeightSyncSpec
from miles_core.testing.checks import cases
from miles_core.testing.kits import rules_of, weight_sync
from miles_qwen.family import Qwen3
from miles_torch.critic import TorchCritic
from miles_torch.engine import TorchEngine
from miles_torch.sync import TorchReceiver, TorchSender
from miles_torch.trainer import TorchTrainer


def faults(monkeypatch: pytest.MonkeyPatch, rule: str, like: tuple[type[Spec], str], **parts: Any) -> tuple[str, ...]:
    """What a rule says. like: the record that the component shares its traits with; parts: field -> class."""
    module = ModuleType("acme_parts")
    monkeypatch.setitem(sys.modules, "acme_parts", module)
    for field, part in parts.items():
        setattr(module, field, part)
    record = replace(discover().get(*like).spec, **{field: f"acme_parts:{field}" for field in parts})
    plugin = Plugin(name="acme", version="1", entry="acme", requires=">=0.1", status="active", records=(record,))
    (case,) = (case for case in cases(plugin) if case.rule == rule)
    return case.run().faults


# ---- Engines --------------------------------------------------------------------------------------------------------


class Changing(TorchEngine):
    """Changes completions on their way out."""

    def change(self, completion: Completion) -> Completion:
        return completion

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, list[Completion]]]:
        return self._changed(super().generate(requests))

    async def _changed(self, answers: Any) -> AsyncIterator[tuple[str, list[Completion]]]:
        async for name, completions in answers:
            yield name, [self.change(completion) for completion in completions]


class WrongLogprobs(Changing):
    def change(self, completion: Completion) -> Completion:
        return replace(completion, logprobs=completion.logprobs - np.float32(1e-4))


class WrongVersions(Changing):
    def change(self, completion: Completion) -> Completion:
        return replace(completion, versions=np.zeros_like(completion.versions))


class TooShort(Changing):
    def change(self, completion: Completion) -> Completion:
        return replace(completion, logprobs=completion.logprobs[1:])


class Warm(TorchEngine):
    """Draws although it shall take the likeliest."""

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, list[Completion]]]:
        return super().generate([replace(one, sampling=replace(one.sampling, temperature=1.0)) for one in requests])


class ScoresTheNext(TorchEngine):
    async def score(self, requests: Any) -> Any:
        return [replace(one, logprobs=np.roll(one.logprobs, 1)) for one in await super().score(requests)]


class NeverAborts(TorchEngine):
    async def abort(self, ids: Iterable[str] | None = None) -> None: ...


class DrainsAlways(TorchEngine):
    async def pause(self, mode: PauseMode) -> None:
        await super().pause("drain")


class IgnoresSeeds(TorchEngine):
    seed = 0

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, list[Completion]]]:
        type(self).seed += 1
        return super().generate([replace(one, seeds=tuple(self.seed for _ in one.seeds)) for one in requests])


@pytest.mark.parametrize(
    ("engine", "rule", "fault"),
    [
        (WrongLogprobs, "gives_the_logprobs_of_the_model", "a log-probability differs by"),
        (WrongVersions, "pauses_as_its_record_says", "in-place: tokens of both versions are wanted"),
        (TooShort, "gives_each_seed_a_completion", "columns of lengths [5, 6]"),
        (Warm, "takes_the_likeliest_token_when_greedy", "is not the likeliest one"),
        (ScoresTheNext, "scores_given_tokens", "logprobs differs by"),
        (NeverAborts, "ends_what_is_aborted", "the aborted request has 256 tokens"),
        (DrainsAlways, "pauses_as_its_record_says", "in-place: what runs must not be finished when `pause` returns"),
        (IgnoresSeeds, "gives_the_same_seed_the_same_tokens", "gives other tokens when the same seeds come again"),
    ],
)
def test_engines(monkeypatch: pytest.MonkeyPatch, engine: type, rule: str, fault: str) -> None:
    assert fault in str(faults(monkeypatch, rule, (EngineSpec, "torch"), ref=engine))


# ---- Trainers -------------------------------------------------------------------------------------------------------


class Averages(TorchTrainer):
    """Its objective is a mean over tokens, whatever the weights say."""

    def update(self, batch: Batch, step: int, passes: int) -> Mapping[str, float]:
        return super().update(batch.with_columns(weights=np.full(batch.tokens_total, 1e-3)), step, passes)


class Climbs(TorchTrainer):
    def update(self, batch: Batch, step: int, passes: int) -> Mapping[str, float]:
        return super().update(batch.with_columns(advantages=-batch["advantages"]), step, passes)


class TurnsAGradient(TorchTrainer):
    """One layer climbs, which no norm shows."""

    def begin(self, stage: TrainStage) -> None:
        super().begin(stage)
        weight = self._policy.model.get_parameter("model.layers.1.mlp.up_proj.weight")
        assert self._optimizer is not None

        def turn(*_: Any) -> None:
            weight.grad.neg_()

        self._optimizer.register_step_pre_hook(turn)


class ForgetsAMicroBatch(TorchTrainer):
    """Shows only where a batch is cut."""

    def _plan(self, batch: Batch, samples: Sequence[int]) -> Any:
        packed = super()._plan(batch, samples)
        return packed[:1] if len(packed) > 1 else packed


class DeafToHooks(TorchTrainer):
    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, replace(context, hooks=None))


class ForgetsTheNorm(TorchTrainer):
    def save_pretrained(self, folder: Any) -> None:
        with torch.no_grad():
            self._policy.model.get_parameter("model.norm.weight").fill_(1.0)
        super().save_pretrained(folder)


class MistakesTheTokens(TorchTrainer):
    def update(self, batch: Batch, step: int, passes: int) -> Mapping[str, float]:
        if "teacher_top_tokens" in batch:
            batch = batch.with_columns(teacher_top_tokens=batch["teacher_top_tokens"][:, ::-1].copy())
        return super().update(batch, step, passes)


class ForgetsTheOptimizer(TorchTrainer):
    def restore(self, folder: Any) -> None:
        super().restore(folder)
        assert self._optimizer is not None
        self._optimizer.state.clear()


class MovesTheReference(TorchTrainer):
    def update(self, batch: Batch, step: int, passes: int) -> Mapping[str, float]:
        report = super().update(batch, step, passes)
        if self._reference is not None:
            self._reference.load_state_dict(self._policy.state_dict())
        return report


class WrongTemperature(TorchTrainer):
    def logprobs(self, batch: Batch, which: Any, step: int) -> Any:
        return super().logprobs(replace(batch, temperature=1.1), which, step)


class Twice(TorchTrainer):
    def export(self) -> Iterator[Bucket]:
        for bucket in super().export():
            yield bucket
            yield bucket


class Rounds(TorchTrainer):
    def export(self) -> Iterator[Bucket]:
        return (replace(bucket, flat=bucket.flat.bfloat16().float()) for bucket in super().export())


@pytest.mark.parametrize(
    ("trainer", "rule", "fault"),
    [
        (Averages, "has_the_gradient_of_the_objective", "grad_norm is"),
        (Climbs, "learns", "it must rise"),
        (TurnsAGradient, "has_the_gradient_of_the_objective", "model.layers.1.mlp.up_proj.weight differs by 2 "),
        (ForgetsAMicroBatch, "has_the_gradient_of_the_objective", "('one by one: loss is"),
        (DeafToHooks, "has_the_gradient_of_the_objective", "before_train_step is not told"),
        (ForgetsTheNorm, "saves_for_transformers", "model.norm.weight differs"),
        (MistakesTheTokens, "gives_the_logprobs_of_the_teachers_tokens", "grad_norm is"),
        (ForgetsTheOptimizer, "continues_exactly_from_a_checkpoint", "differs"),
        (MovesTheReference, "keeps_the_reference", "after a step the reference differs"),
        (WrongTemperature, "gives_the_logprobs_of_the_model", "a log-probability differs"),
        (Twice, "exports_what_its_layout_says", "is exported 2 times"),
        (Rounds, "exports_what_its_layout_says", "model.embed_tokens.weight differs"),
    ],
)
def test_trainers(monkeypatch: pytest.MonkeyPatch, trainer: type, rule: str, fault: str) -> None:
    assert fault in str(faults(monkeypatch, rule, (TrainerSpec, "torch"), ref=trainer))


class LooksAhead(TorchCritic):
    """Reads a value once its token is known."""

    def values(self, batch: Batch, step: int) -> Any:
        return super().values(batch.with_columns(tokens=np.roll(batch["tokens"], -1)), step)


class LearnsSomethingElse(TorchCritic):
    def update(self, batch: Batch, step: int, passes: int) -> Mapping[str, float]:
        return super().update(batch.with_columns(returns=batch["returns"] / 2), step, passes)


class ForgetsTheHead(TorchCritic):
    def restore(self, folder: Any) -> None:
        super().restore(folder)
        torch.nn.init.zeros_(self._policy.model.score.weight)


class KeepsItsWeights(TorchCritic):
    def load_pretrained(self, folder: Any) -> None: ...


@pytest.mark.parametrize(
    ("critic", "rule", "fault"),
    [
        (LooksAhead, "knows_values_before_their_tokens", "or its own, is another one"),
        (LearnsSomethingElse, "learns_values", "loss is"),
        (ForgetsTheHead, "continues_its_critic_exactly_from_a_checkpoint", "a value differs"),
        (KeepsItsWeights, "hands_the_policys_weights_to_its_critic", "its values do not change with the weights"),
    ],
)
def test_critics(monkeypatch: pytest.MonkeyPatch, critic: type, rule: str, fault: str) -> None:
    assert fault in str(faults(monkeypatch, rule, (TrainerSpec, "torch"), critic=critic))


# ---- Weight syncs and models ----------------------------------------------------------------------------------------


class FlipsABit(TorchReceiver):
    def receive(self, load: Any) -> None:
        def corrupted(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
            load(names, [tensor if name != "c" else -tensor for name, tensor in zip(names, tensors, strict=True)])

        super().receive(corrupted)


def test_weight_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = "carries_every_tensor_to_every_engine"
    found = faults(monkeypatch, rule, (WeightSyncSpec, "torch-to-torch"), ref=TorchSender, receiver=FlipsABit)
    assert "float32, transfer 0, engine 0: c is not what was sent" in found
    assert all(": c is not" in fault for fault in found)


class WaitsOn(TorchSender):
    def give_up(self) -> None: ...


class WaitsForNobody(TorchSender):
    def connect(self) -> None: ...


@pytest.mark.parametrize(
    ("sender", "soon_s", "fault"),
    [
        (WaitsOn, 0.1, "still waits 0.1 s after the meeting was given up"),
        (WaitsForNobody, 20.0, "the trainer does not wait for engine 1"),
    ],
)
def test_weight_syncs_that_are_given_up(
    monkeypatch: pytest.MonkeyPatch, sender: type, soon_s: float, fault: str
) -> None:
    monkeypatch.setattr(weight_sync, "SOON_S", soon_s)
    rule = "keeps_nobody_who_waits_for_an_engine_that_has_failed"
    found = faults(monkeypatch, rule, (WeightSyncSpec, "torch-to-torch"), ref=sender, receiver=TorchReceiver)
    assert any(fault in one for one in found)


class CountsTiedTwice(Qwen3):
    def parameters(self, config: Mapping[str, Any]) -> int:
        return super().parameters({**config, "tie_word_embeddings": False})


class TakesAnything(Qwen3):
    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().fresh({name: value for name, value in config.items() if name != "hidden_sise"})


class OtherArchitecture(Qwen3):
    def fresh(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().fresh(config), "architectures": ["Qwen2ForCausalLM"]}


@pytest.mark.parametrize(
    ("family", "rule", "fault"),
    [
        (CountsTiedTwice, "is_known_to_transformers", "parameters, and there are"),
        (TakesAnything, "refuses_unknown_fields", "it accepts the field hidden_sise"),
        (OtherArchitecture, "completes_a_config", "the config says ['Qwen2ForCausalLM']"),
    ],
)
def test_models(monkeypatch: pytest.MonkeyPatch, family: type, rule: str, fault: str) -> None:
    assert fault in str(faults(monkeypatch, rule, (ModelSpec, "qwen3"), ref=family))


@pytest.mark.parametrize(
    ("trainer", "rule", "fault"),
    [
        (ForgetsTheNorm, "comes_back_from_a_trainer", "model.norm.weight differs"),
        (WrongTemperature, "has_the_logprobs_of_transformers", "a log-probability differs"),
    ],
)
def test_a_model_whose_trainer_gets_it_wrong(
    monkeypatch: pytest.MonkeyPatch, trainer: type, rule: str, fault: str
) -> None:
    monkeypatch.setattr("miles_torch.trainer.TorchTrainer", trainer)
    assert fault in str(faults(monkeypatch, rule, (ModelSpec, "qwen3"), ref=Qwen3))


def test_every_rule_has_a_component_that_breaks_it() -> None:
    kits = ("tests/test_model_kits.py", "miles-core/tests/test_kits.py")
    tests = "".join((Path(__file__).parents[1] / path).read_text() for path in kits)
    rules = {rule.__name__ for kind in declaration_kinds().values() for rule in rules_of(kind)}
    assert {rule for rule in rules if f'"{rule}"' not in tests} == set()
