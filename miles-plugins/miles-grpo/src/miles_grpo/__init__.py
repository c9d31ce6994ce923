"""Miles plugin: group-relative policy optimisation and its family, and what corrects for other people's samples."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from miles_core import AdvantageSpec, CorrectionSpec, LossSpec, RecipeSpec, RolloutSpec, hookimpl


@hookimpl
def miles_advantages() -> Iterable[AdvantageSpec]:
    """Advantages from rewards alone, without a critic."""
    yield _advantage("grpo", "grpo:grpo", "GRPOAdvantage", "Reward minus the group's mean, divided by its deviation")
    yield _advantage("dr-grpo", "grpo:dr_grpo", "InReward", "Reward minus the group's mean")
    yield _advantage("rloo", "rloo:rloo", "InReward", "Reward minus the mean reward of the group's other samples")
    yield _advantage("opo", "opo:opo", "InReward", "Reward minus the group's mean weighted by length")
    yield _advantage(
        "remax", "remax:remax", "InReward", "Reward minus the reward of the greedy response", baseline=True
    )
    yield _advantage(
        "reinforce++",
        "reinforce:reinforce_plus_plus",
        "ReinforcePlusPlus",
        "Discounted return, whitened over the batch",
        groups=False,
    )
    yield _advantage(
        "reinforce++-baseline",
        "reinforce:reinforce_plus_plus_baseline",
        "ReinforcePlusPlus",
        "reinforce++ with the group's mean taken off the reward first",
    )
    yield AdvantageSpec(
        name="gdpo",
        ref="miles_grpo.advantage.gdpo:gdpo",
        options="miles_grpo.options:GDPO",
        groups=True,
        summary="Each reward normalised within its group, then summed and whitened over the batch",
    )


def _advantage(
    name: str, function: str, options: str, summary: str, *, groups: bool = True, baseline: bool = False
) -> AdvantageSpec:
    """One that can take a KL divergence off the reward."""
    return AdvantageSpec(
        name=name,
        ref=f"miles_grpo.advantage.{function}",
        options=f"miles_grpo.options:{options}",
        needs_if={"old_logprobs": "kl_coef", "ref_logprobs": "kl_coef"},
        kl_coef="kl_coef",
        groups=groups,
        baseline=baseline,
        summary=summary,
    )


@hookimpl
def miles_losses() -> Iterable[LossSpec]:
    """Policy losses."""
    yield _loss("grpo", "clipped:clipped", "ClippedLoss", "Clipped surrogate with separate bounds and dual clip")
    yield _loss("gspo", "gspo:gspo", "GSPO", "Clipped surrogate of the whole sequence's ratio")
    yield _loss("gspo-token", "gspo:gspo_token", "GSPO", "gspo with each token's own gradient and advantage")
    yield _loss("cispo", "cispo:cispo", "CISPO", "Clipped importance weight, gradient for every token")
    yield _loss("sapo", "sapo:sapo", "SAPO", "A soft gate in the place of the clip")
    yield _loss("geo-mean", "geo_mean:geo_mean", "GeoMean", "Geometric mean of the tokens' clipped ratios")
    for name, function, options, summary in (
        ("clip-cov", "covariance:clip_cov", "ClipCov", "Drops a few tokens that cost the most entropy"),
        ("kl-cov", "covariance:kl_cov", "KLCov", "Penalises a few tokens that cost the most entropy"),
    ):
        yield replace(_loss(name, function, options, summary), compares_samples=True)
    yield _loss("dppo", "dppo:dppo", "DPPO", "Trust region by total variation or KL divergence of each token")
    yield LossSpec(
        name="reinforce",
        ref="miles_grpo.loss.reinforce:reinforce",
        options="miles_grpo.options:Reinforce",
        needs=frozenset({"advantages"}),
        needs_if={"ref_logprobs": "kl_coef"},
        kl_coef="kl_coef",
        entropy_if="entropy_coef",
        summary="Plain policy gradient",
    )


def _loss(name: str, function: str, options: str, summary: str) -> LossSpec:
    """A loss that compares the policy with the one before the batch's first update."""
    return LossSpec(
        name=name,
        ref=f"miles_grpo.loss.{function}",
        options=f"miles_grpo.options:{options}",
        needs=frozenset({"advantages", "old_logprobs"}),
        needs_if={"ref_logprobs": "kl_coef"},
        kl_coef="kl_coef",
        entropy_if="entropy_coef",
        summary=summary,
    )


@hookimpl
def miles_corrections() -> Iterator[CorrectionSpec]:
    """What a token counts that the rollout's policy wrote and the trainer's would have written with other odds."""
    yield CorrectionSpec(
        name="tis",
        ref="miles_grpo.correction.tis:tis",
        options="miles_grpo.options:TIS",
        summary="Importance sampling, truncated, clipped or masked, by token or by sequence",
    )
    yield CorrectionSpec(
        name="icepop",
        ref="miles_grpo.correction.tis:tis",
        options="miles_grpo.options:IcePop",
        summary="Importance sampling; tokens outside of a band are masked",
    )
    yield CorrectionSpec(
        name="mis",
        ref="miles_grpo.correction.mis:mis",
        options="miles_grpo.options:MIS",
        summary="Importance sampling with rejection of tokens or sequences, and a veto",
    )
    yield CorrectionSpec(
        name="opsm",
        ref="miles_grpo.correction.opsm:opsm",
        options="miles_grpo.options:OPSM",
        needs=frozenset({"advantages", "old_logprobs", "rollout_logprobs"}),
        summary="Masks bad samples that the policy has moved away from",
    )


@hookimpl
def miles_rollouts() -> Iterable[RolloutSpec]:
    """The rollout of ReMax."""
    yield RolloutSpec(
        name="greedy-baseline",
        ref="miles_grpo.rollout:GreedyBaseline",
        baseline=True,
        summary="One completion per sample, the last one greedy and only there to be compared with",
    )


_RECIPES = {
    "arithmetic": "A small new model learns to add: supervised warm-up, then GRPO; on a laptop, in minutes",
    "arithmetic-dr-grpo": "The same by Dr. GRPO: nothing divides by deviation or length",
    "arithmetic-dapo": "The same by DAPO: clip-higher, dynamic sampling, and a price on long answers",
    "arithmetic-gspo": "The same by GSPO: ratios of whole sequences",
    "arithmetic-cispo": "The same by CISPO: bounded weights, a gradient for every token",
    "arithmetic-sapo": "The same by SAPO: a soft gate in the place of the clip",
    "arithmetic-gmpo": "The same by GMPO: the geometric mean of the tokens' ratios",
    "arithmetic-clip-cov": "The same by Clip-Cov: tokens that cost entropy are left out",
    "arithmetic-kl-cov": "The same by KL-Cov: tokens that cost entropy are held back",
    "arithmetic-dppo": "The same by DPPO: a trust region in total variation",
    "arithmetic-reinforce++": "The same by REINFORCE++: one sample a prompt, whitened over the batch",
    "arithmetic-reinforce++-baseline": "The same by REINFORCE++ with the prompt's mean as baseline",
    "arithmetic-rloo": "The same by RLOO: the prompt's other samples as baseline",
    "arithmetic-remax": "The same by ReMax: the greedy response as baseline",
    "arithmetic-opo": "The same by OPO: a baseline weighted by length",
    "arithmetic-gdpo": "The same with two rewards, each normalised by itself",
    "arithmetic-decoupled": "The same by decoupled PPO, on samples up to four versions old",
}


_STACK = {
    "smollm2-arithmetic": (
        "SmolLM2-135M learns to add by GRPO: SGLang generates, Megatron trains; one GPU, minutes",
        "miles-llama",
    ),
    "qwen3-0.6b-arithmetic": ("Qwen3-0.6B learns longer sums by GRPO: SGLang generates, Megatron trains", "miles-qwen"),
}


@hookimpl
def miles_recipes() -> Iterable[RecipeSpec]:
    """Run files that need nothing but a laptop, and some for a GPU."""
    for name, summary in _RECIPES.items():
        yield RecipeSpec(
            name=name,
            ref=f"miles_grpo:recipes/{name.replace('++', '-plus-plus')}.toml",
            requires=("miles-torch", "miles-sft", "miles-rewards", "miles-qwen", "miles-trackers"),
            summary=summary,
        )
    for name, (summary, family) in _STACK.items():
        yield RecipeSpec(
            name=name,
            ref=f"miles_grpo:recipes/{name}.toml",
            requires=("miles-megatron", "miles-sglang", "miles-rewards", "miles-trackers", family),
            summary=summary,
        )
