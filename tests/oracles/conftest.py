"""The published implementations, and random batches in their padded form and in ours.

They are installed without what they require (requirements.txt), so their packages' own __init__ modules, which import
servers and schedulers, are passed over, and what cannot be had without a GPU is replaced by stubs. The functions that
are compared are the installed ones, untouched.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from miles_core.config.schema import LossSection
from miles_core.roles import AdvantageInputs, CorrectionInputs, CriticInputs, LossInputs, Segments
from miles_core.run.weights import aggregate
from miles_core.sample import Batch

_SPECS = {name: importlib.util.find_spec(name) for name in ("areal", "openrlhf", "trl", "verl")}
collect_ignore_glob = [] if all(_SPECS.values()) else ["test_*.py"]

torch.set_num_threads(1)


# ---- Importing them -------------------------------------------------------------------------------------------------


class _Anything(type):
    """Classes whose every attribute is another one."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Stub(ModuleType):
    """A module that has whatever is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": lambda self, *_, **__: None, "__call__": lambda self, one: one})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stubs for the given modules and everything below them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


def _load(module: str, *, bare: Sequence[str] = (), stubs: Sequence[str] = ()) -> ModuleType:
    """Imports a module: the packages in `bare` without their __init__, the modules in `stubs` as stubs."""
    for name in bare:
        found = _SPECS[name.partition(".")[0]]
        assert found is not None
        assert found.origin is not None
        package = ModuleType(name)
        package.__path__ = [str(Path(found.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules.setdefault(name, package)
    finder = _Finder(stubs)
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    finally:
        sys.meta_path.remove(finder)


@pytest.fixture(scope="session")
def verl() -> SimpleNamespace:
    """verl's core algorithms and rollout corrections; `actor` builds its configuration of an actor."""
    algos = _load("verl.trainer.ppo.core_algos")

    def actor(**settings: Any) -> Any:
        return algos.ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **settings)

    correction = _load("verl.trainer.ppo.rollout_corr_helper")
    return SimpleNamespace(algos=algos, correction=correction, actor=actor, policy=correction.PolicyLossConfig)


@pytest.fixture
def openrlhf(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """OpenRLHF's losses, its KL estimators, and its advantages. What it turns into float32 stays float64 here."""
    how = {
        "bare": ["openrlhf", "openrlhf.models", "openrlhf.trainer", "openrlhf.trainer.ppo_utils"],
        "stubs": ["deepspeed", "openrlhf.trainer.ray", "openrlhf.datasets", "openrlhf.utils"],
    }
    modules = SimpleNamespace(
        loss=_load("openrlhf.models.loss", **how),
        models=_load("openrlhf.models.utils", **how),
        maker=_load("openrlhf.trainer.ppo_utils.experience_maker", **how).RemoteExperienceMaker,
    )
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    return modules


@pytest.fixture
def areal(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """AReaL's losses and advantages. What it turns into float32 stays float64 here."""
    how = {
        "bare": ["areal", "areal.utils", "areal.trainer", "areal.trainer.ppo"],
        "stubs": ["areal.api", "areal.infra", "areal.experimental", "numba"],
    }
    modules = SimpleNamespace(
        functional=_load("areal.utils.functional.functional", **how),
        actor=_load("areal.trainer.ppo.actor", **how),
        data=_load("areal.utils.data", **how),
    )
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    return modules


@pytest.fixture(scope="session")
def trl() -> SimpleNamespace:
    """TRL's GRPO trainer."""
    return SimpleNamespace(grpo=_load("trl.trainer.grpo_trainer").GRPOTrainer, utils=_load("trl.trainer.utils"))


@pytest.fixture(scope="session")
def trl_distill() -> SimpleNamespace:
    """TRL's divergences of distillation, in float64 as they are called."""
    gkd = _load("trl.experimental.gkd.gkd_trainer")
    opd = _load("trl.experimental.iw_opd.iw_opd_trainer", stubs=["mlflow", "trackio", "wandb"])
    return SimpleNamespace(
        gkd=gkd.GKDTrainer, opd=opd.IWOPDTrainer, add_tail=opd._add_tail_bucket, divergence=opd._jsd_divergence
    )


@pytest.fixture
def verl_distill(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """verl's divergence of distillation. What it turns into float32 stays float64 here."""
    module = _load("verl.trainer.distillation.fsdp.losses")
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    return module


# ---- Batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One batch, padded as the others have it: [B, T], float64; mask bool, true where trained; rewards, groups [B]."""

    mask: Tensor
    logprobs: Tensor
    old: Tensor
    rollout: Tensor
    reference: Tensor
    advantages: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    entropy: Tensor
    rewards: Tensor
    groups: NDArray[np.int64]

    def full(self) -> Case:
        """The same with a trained token in each sample."""
        mask = self.mask.clone()
        mask[:, 0] = True
        return replace(self, mask=mask)

    @property
    def last(self) -> Tensor:
        """The place of each sample's last trained token, [B]; 0 if it has none."""
        places = torch.arange(self.mask.shape[1]) * self.mask
        return places.max(dim=1).values

    @property
    def token_rewards(self) -> Tensor:
        """Each sample's reward at its last trained token, [B, T]."""
        return torch.zeros_like(self.old).scatter(1, self.last[:, None], self.rewards[:, None]) * self.mask

    @cached_property
    def segments(self) -> Segments:
        """The sample of each trained token."""
        return Segments(ids=self.mask.nonzero()[:, 0], count=len(self.mask))

    def loss_inputs(self) -> LossInputs:
        """The trained tokens, packed."""
        mask = self.mask
        return LossInputs(
            logprobs=self.logprobs[mask],
            segments=self.segments,
            advantages=self.advantages[mask],
            old_logprobs=self.old[mask],
            rollout_logprobs=self.rollout[mask],
            ref_logprobs=self.reference[mask],
            entropy=self.entropy[mask],
        )

    def critic_inputs(self) -> CriticInputs:
        """The trained tokens, packed."""
        mask = self.mask
        return CriticInputs(
            values=self.values[mask],
            returns=self.returns[mask],
            old_values=self.old_values[mask],
            segments=self.segments,
        )

    def correction_inputs(self) -> CorrectionInputs:
        """The trained tokens, packed."""
        mask = self.mask
        return CorrectionInputs(
            logprobs=self.logprobs.detach()[mask],
            old_logprobs=self.old[mask],
            rollout_logprobs=self.rollout[mask],
            segments=self.segments,
            advantages=self.advantages[mask],
        )

    def advantage_inputs(self, parts: dict[str, Tensor] | None = None) -> AdvantageInputs:
        """All tokens, row after row."""
        rows, columns = self.mask.shape
        return AdvantageInputs(
            rewards=self.rewards.numpy(),
            reward_parts={name: scores.numpy() for name, scores in (parts or {}).items()},
            groups=self.groups,
            segment_ids=np.repeat(np.arange(rows), columns),
            mask=self.mask.reshape(-1).numpy(),
            columns={
                "values": self.old_values.reshape(-1).numpy(),
                "old_logprobs": self.old.reshape(-1).numpy(),
                "ref_logprobs": self.reference.reshape(-1).numpy(),
            },
        )

    def padded(self, column: NDArray[np.float64]) -> Tensor:
        """A column of `advantage_inputs`, [B, T]."""
        return torch.from_numpy(column).reshape(self.mask.shape)

    def weights(self, aggregation: Any, length: int | None = None) -> Tensor:
        """`Batch.weights` of the trained tokens."""
        rows, columns = self.mask.shape
        batch = Batch(
            cu_seqlens=np.arange(rows + 1) * columns,
            columns={"mask": self.mask.reshape(-1).numpy()},
            samples={"group": self.groups, "index": np.arange(rows)},
        )
        section = LossSection(name="x", aggregation=aggregation, aggregation_length=length)
        column = aggregate(batch, section, 1)["weights"]
        return torch.from_numpy(column)[self.mask.reshape(-1)]


def _masks(generator: torch.Generator, rows: int, columns: int, empty: bool) -> Tensor:
    """Ragged rows with gaps, among them one of a single token and, if asked for, one of none."""
    lengths = torch.randint(2, columns + 1, (rows,), generator=generator)
    mask = (torch.arange(columns) < lengths[:, None]) & (torch.rand(rows, columns, generator=generator) > 0.25)
    mask[:, 0] = True
    mask[1, 1:] = False
    if empty:
        mask[2] = False
    return mask


@pytest.fixture(scope="session")
def make() -> Callable[..., Case]:
    """Builds a batch. spread: how far the policies are apart; empty: one sample has no trained token; whole: groups of
    four, else ragged ones, among them a group of one, with equal rewards in one. extreme: the policies have nothing to
    do with one another, so ratios are huge and tiny alike, but for a sample on which all agree. clipped: the policy has
    moved the way of every token's advantage, and further than 0.5.
    """

    def build(
        seed: int = 0,
        *,
        spread: float = 0.5,
        empty: bool = True,
        whole: bool = False,
        rows: int = 8,
        extreme: bool = False,
        clipped: bool = False,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        columns = 9

        def normal(scale: float = 1.0) -> Tensor:
            return scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

        def near(base: Tensor, distance: float) -> Tensor:
            if not extreme:
                return (base + normal(distance)).clamp(max=-0.01)
            alone = -normal(distance).abs() - 0.05
            alone[1] = base[1]
            return alone

        old = -normal(spread if extreme else 1.0).abs() - 0.05 - 4.0 * clipped
        ragged = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3] * (rows // 8 + 1))[:rows]
        groups = torch.arange(rows) // 4 if whole else ragged
        rewards = torch.randn(rows, generator=generator, dtype=torch.float64)
        rewards[groups == 3] = 0.25
        mask = _masks(generator, rows, columns, empty)
        advantages = normal() * mask
        moved = old + advantages.sign() * (0.5 + normal(spread).abs()) if clipped else near(old, spread)
        return Case(
            mask=mask,
            logprobs=moved.clamp(max=-0.01).requires_grad_(),
            old=old,
            rollout=near(old, spread / 2),
            reference=near(old, spread),
            advantages=advantages,
            values=normal().requires_grad_(),
            old_values=normal(),
            returns=normal(),
            entropy=normal().abs().requires_grad_(),
            rewards=rewards,
            groups=groups.numpy(),
        )

    return build


CASES: dict[str, dict[str, Any]] = {
    "near": {"seed": 0, "spread": 0.2},
    "apart": {"seed": 1, "spread": 0.6},
    "far": {"seed": 2, "spread": 2.0},
    "clipped": {"seed": 3, "clipped": True},
    "extreme": {"seed": 4, "spread": 30.0, "extreme": True},
}
"""The batches that everything is compared on. In `extreme` every bound on a log-ratio is passed."""


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, make: Callable[..., Case]) -> Case:
    return make(**CASES[request.param])


@pytest.fixture(params=CASES)
def unbounded(request: pytest.FixtureRequest, make: Callable[..., Case]) -> Case:
    """For those who do not bound log-ratios: all are within our bound of 20."""
    case = make(**{**CASES[request.param], **({"spread": 7.0} if request.param == "extreme" else {})})
    assert all((other - case.old).abs().max() < 20 for other in (case.logprobs, case.rollout, case.reference))
    return case


@pytest.fixture
def same() -> Callable[..., None]:
    """Compares two totals and their gradients."""

    def check(ours: Tensor, theirs: Tensor, *leaves: Tensor, within: float = 1e-8) -> None:
        torch.testing.assert_close(ours, theirs, atol=within, rtol=within)
        for leaf in leaves:
            (got,) = torch.autograd.grad(ours, leaf, retain_graph=True)
            (wanted,) = torch.autograd.grad(theirs, leaf, retain_graph=True)
            torch.testing.assert_close(got, wanted, atol=within, rtol=within)

    return check
