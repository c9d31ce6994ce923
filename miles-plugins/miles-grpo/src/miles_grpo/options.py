"""Options of the components; imports nothing heavy.

Where published implementations differ, an option chooses and says who does what; docs/reference/algorithms.md has it
all in one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def _share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


# ---- Advantages -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InReward:
    """kl_coef, kl_estimator: the KL divergence from the old policy to the reference that is taken off the reward; 0
    switches it off."""

    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"

    def __post_init__(self) -> None:
        _not_negative(kl_coef=self.kl_coef)


@dataclass(frozen=True, kw_only=True)
class GRPOAdvantage(InReward):
    """std: divisor n - 1 ("sample": TRL, verl, slime, OpenRLHF) or n ("population"). eps: added to the standard
    deviation: 1e-6 in verl and slime, 1e-4 in TRL, 1e-9 in OpenRLHF. scale: over the samples of a prompt, or of the
    whole batch (TRL's scale_rewards="batch")."""

    std: Literal["sample", "population"] = "sample"
    eps: float = 1e-6
    scale: Literal["group", "batch"] = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class WhitenOptions:
    """Whitening over all trained tokens of the batch.

    variance: divisor n - 1 ("sample": verl, TRL) or n ("population": OpenRLHF, AReaL). eps, eps_added_to: what is added
    to the "variance" (verl: 1e-8) or to the standard "deviation" (AReaL: 1e-5, TRL: 1e-4); OpenRLHF takes the larger of
    the variance and 1e-8.
    """

    variance: Literal["sample", "population"] = "sample"
    eps: float = 1e-8
    eps_added_to: Literal["variance", "deviation"] = "variance"

    def __post_init__(self) -> None:
        _positive(eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(InReward, WhitenOptions):
    """gamma: discount per trained token. The KL divergence is taken off each token's reward."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        InReward.__post_init__(self)
        WhitenOptions.__post_init__(self)
        _share(gamma=self.gamma)


@dataclass(frozen=True, kw_only=True)
class GDPO(WhitenOptions):
    """std, eps_std: of each reward within its group, as in `GRPOAdvantage`. whiten: over all trained "tokens" of the
    batch (verl), over its "samples" (TRL), or "none"."""

    std: Literal["sample", "population"] = "sample"
    eps_std: float = 1e-6
    whiten: Literal["tokens", "samples", "none"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(eps_std=self.eps_std)


# ---- Losses ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Regularised:
    """What every policy loss has.

    kl_coef: weight of the KL divergence to the frozen reference, 0 switches it off. kl_estimator, kl_gradient and
    kl_clamp: see `miles_grpo.kl`. entropy_coef: weight of the entropy bonus, 0 switches it off.
    """

    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    kl_gradient: Literal["direct", "k2", "k2-weighted", "weighted"] = "direct"
    kl_clamp: float | None = None
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        _not_negative(kl_coef=self.kl_coef, entropy_coef=self.entropy_coef)
        if self.kl_clamp is not None:
            _positive(kl_clamp=self.kl_clamp)


@dataclass(frozen=True, kw_only=True)
class Reinforce(Regularised):
    """Nothing of its own. It reads no old policy, so the weighted KL gradients are not for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_gradient in ("weighted", "k2-weighted"):
            raise ValueError(f'kl_gradient = "{self.kl_gradient}" needs an old policy; "direct" and "k2" do not')


@dataclass(frozen=True, kw_only=True)
class Clipped(Regularised):
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(clip_low=self.clip_low)
        _not_negative(clip_high=self.clip_high)


@dataclass(frozen=True, kw_only=True)
class ClippedLoss(Clipped):
    """dual_clip: bound on the loss of tokens with a negative advantage, as a multiple of it; above 1, commonly 3 (which
    verl always has); None switches it off."""

    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")


@dataclass(frozen=True, kw_only=True)
class GSPO(Clipped):
    """Bounds as in the paper: the ratio of a whole sequence moves far less than a token's."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4


@dataclass(frozen=True, kw_only=True)
class CISPO(Clipped):
    """clip_low = 1 is no lower bound, as in the paper and TRL (whose epsilon_high is 1 + clip_high); verl has one."""

    clip_low: float = 1.0
    clip_high: float = 4.0


@dataclass(frozen=True, kw_only=True)
class SAPO(Regularised):
    """tau_positive, tau_negative: sharpness of the gate for tokens with positive and with negative advantage."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(tau_positive=self.tau_positive, tau_negative=self.tau_negative)


@dataclass(frozen=True, kw_only=True)
class GeoMean(Regularised):
    """Each token's log-ratio is clipped to [-clip_low, clip_high]; 0.4 in the paper."""

    clip_low: float = 0.4
    clip_high: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(clip_low=self.clip_low, clip_high=self.clip_high)


@dataclass(frozen=True, kw_only=True)
class ClipCov(Clipped):
    """share: of all tokens, how many lose their gradient; at least one. cov_low, cov_high: they are drawn from those
    whose covariance lies between."""

    share: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(share=self.share)
        if self.cov_low >= self.cov_high:
            raise ValueError(f"cov_low must be below cov_high, got {self.cov_low} and {self.cov_high}")


@dataclass(frozen=True, kw_only=True)
class KLCov(Regularised):
    """share: of all tokens, how many get the penalty; at least one. penalty: its weight."""

    share: float = 2e-4
    penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(share=self.share)
        _not_negative(penalty=self.penalty)


@dataclass(frozen=True, kw_only=True)
class DPPO(Regularised):
    """divergence: total variation or KL of the two-way choice "this token or another". bound_low, bound_high: beyond
    them, tokens that the update would move further away lose their gradient. ratio_max: bound on the weight."""

    divergence: Literal["tv", "kl"] = "tv"
    bound_low: float = 0.2
    bound_high: float = 0.2
    ratio_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(bound_low=self.bound_low, bound_high=self.bound_high, ratio_max=self.ratio_max)


# ---- Corrections ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TIS:
    """level: the ratio of each token, of the whole sequence (the product; TRL, verl), or its geometric mean (AReaL).
    how: "truncate" takes the smaller of the ratio and `high`, "clip" moves it into [low, high], "mask" gives 0 to what
    lies outside. policy: whose ratio to the rollout policy; "old" is the one before the batch's first update.
    """

    level: Literal["token", "sequence", "geometric"] = "token"
    how: Literal["truncate", "clip", "mask"] = "truncate"
    low: float = 0.0
    high: float = 2.0
    policy: Literal["old", "current"] = "old"

    def __post_init__(self) -> None:
        _not_negative(low=self.low)
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.how == "truncate" and self.low > 0:
            raise ValueError('how = "truncate" has no lower bound; set low = 0, or how = "clip"')


@dataclass(frozen=True, kw_only=True)
class IcePop(TIS):
    """Tokens outside of [low, high] are masked."""

    how: Literal["mask"] = "mask"
    low: float = 0.5
    high: float = 5.0


@dataclass(frozen=True, kw_only=True)
class MIS:
    """What is rejected gets weight 0.

    statistic: "ratio", kept within [low, high]; or the k2 or k3 estimate of the divergence, kept up to `high`.
    level: of each token, or the sum, mean or maximum over a sequence, which is then rejected whole. For the ratio, the
    sum is the product and the mean the geometric mean. veto: a sequence with a token whose ratio is below it is
    rejected. weighted: what is kept counts by its ratio (OpenRLHF), else by 1 (verl's rejection, to go with `tis`).
    policy: as in `TIS`.
    """

    statistic: Literal["ratio", "k2", "k3"] = "ratio"
    level: Literal["token", "sequence-sum", "sequence-mean", "sequence-max"] = "token"
    low: float = 0.5
    high: float = 2.0
    veto: float | None = None
    weighted: bool = True
    policy: Literal["old", "current"] = "old"

    def __post_init__(self) -> None:
        _not_negative(low=self.low)
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.veto is not None:
            _positive(veto=self.veto)


@dataclass(frozen=True, kw_only=True)
class OPSM:
    """delta: sequences with a negative advantage are masked where the mean of log rollout - log policy is above it."""

    delta: float = 1e-4
