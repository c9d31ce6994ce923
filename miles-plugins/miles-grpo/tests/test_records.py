"""The records resolve, the options refuse nonsense, and the module stays light."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest

import miles_grpo
from miles_core.sample import Completion, Prompt, Sampling
from miles_grpo.options import (
    CISPO,
    DPPO,
    GDPO,
    MIS,
    SAPO,
    TIS,
    ClipCov,
    ClippedLoss,
    GeoMean,
    GRPOAdvantage,
    KLCov,
    Regularised,
    Reinforce,
    ReinforcePlusPlus,
)
from miles_grpo.rollout import GreedyBaseline

HOOKS = (
    miles_grpo.miles_advantages,
    miles_grpo.miles_losses,
    miles_grpo.miles_corrections,
    miles_grpo.miles_rollouts,
)
RECORDS = [record for hook in HOOKS for record in hook()]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record.kind} {record.name}")
def test_records_resolve_and_their_options_have_defaults(record):
    assert callable(resolve_name(record.ref))
    if record.options is not None:
        options = resolve_name(record.options)()
        needs_if = getattr(record, "needs_if", {})
        assert all(not getattr(options, option) for option in needs_if.values())


def test_the_module_and_its_options_import_nothing_heavy():
    code = "import miles_grpo, miles_grpo.options, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "ray", "transformers"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GRPOAdvantage(eps=0), "eps must be positive"),
        (lambda: GDPO(eps_std=0), "eps_std must be positive"),
        (lambda: ReinforcePlusPlus(gamma=1.5), r"gamma must be in \[0, 1\]"),
        (lambda: ReinforcePlusPlus(eps=0), "eps must be positive"),
        (lambda: ReinforcePlusPlus(kl_coef=-1), "kl_coef must not be negative"),
        (lambda: Regularised(kl_coef=float("nan")), "kl_coef must not be negative"),
        (lambda: Regularised(entropy_coef=-1), "entropy_coef must not be negative"),
        (lambda: Regularised(kl_clamp=0), "kl_clamp must be positive"),
        (lambda: Reinforce(kl_gradient="weighted"), "needs an old policy"),
        (lambda: ClippedLoss(clip_low=1.5), r"clip_low must be in \[0, 1\]"),
        (lambda: ClippedLoss(clip_high=-1), "clip_high must not be negative"),
        (lambda: ClippedLoss(dual_clip=1.0), "dual_clip must be above 1"),
        (lambda: CISPO(clip_low=2), "clip_low"),
        (lambda: SAPO(tau_negative=0), "tau_negative must be positive"),
        (lambda: GeoMean(clip_high=-0.1), "clip_high must not be negative"),
        (lambda: ClipCov(cov_low=5.0), "cov_low must be below cov_high"),
        (lambda: KLCov(share=2), r"share must be in \[0, 1\]"),
        (lambda: DPPO(bound_low=0), "bound_low must be positive"),
        (lambda: TIS(low=3.0, how="clip"), "low must be below high"),
        (lambda: TIS(low=0.5), "truncate"),
        (lambda: MIS(veto=0.0), "veto must be positive"),
        (lambda: MIS(low=3.0), "low must be below high"),
    ],
)
def test_options_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---- The rollout of ReMax -------------------------------------------------------------------------------------------


class Decoder:
    def decode(self, token_ids, *, skip_special_tokens=False):
        return " ".join(map(str, token_ids))


@dataclass
class Context:
    """Generates the seed, or 0 if nothing is drawn at random."""

    tokenizer: Any = field(default_factory=Decoder)
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9))
    max_tokens: int = 20

    async def generate(self, tokens, seeds, sampling):
        assert sampling.top_p == 0.9
        return [
            Completion(
                tokens=np.array([seed if sampling.temperature else 0, 9], np.int32),
                logprobs=np.zeros(2, np.float32),
                versions=np.zeros(2, np.int32),
                status="completed",
            )
            for seed in seeds
        ]


@pytest.mark.parametrize("seeds", [(5, 6, 7), (7,)])
def test_the_last_sample_is_greedy_untrained_and_the_baseline(seeds):
    prompt = Prompt(id=3, tokens=np.array([1], np.int32), text="x")
    *sampled, last = asyncio.run(GreedyBaseline().run(prompt, seeds, Context()))
    assert [sample.response[0] for sample in sampled] == list(seeds[:-1])
    assert all(sample.mask.all() and not sample.baseline for sample in sampled)
    assert last.response[0] == 0
    assert last.baseline
    assert not last.mask.any()
    assert [sample.index for sample in (*sampled, last)] == list(range(len(seeds)))
