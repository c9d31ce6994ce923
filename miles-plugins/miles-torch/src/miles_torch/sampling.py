"""Drawing one token for every row at once.

A row's token is the inverse of the cumulative distribution at one uniform number. The numbers of a sequence are a
stream of its own, made from its seed by the counter-based generator Philox, and token t uses number t: the same seed
and the same probabilities give the same token, whatever else is in the batch.

Shapes: B rows; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miles_core.sample import Sampling

_MASK_128 = (1 << 128) - 1


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """The first `count` numbers of the stream of `seed`, float64 [count] in [0, 1).

    They keep 52 bits, so that a number times a sum is always below the sum, after rounding too.
    """
    raw = np.random.Philox(key=seed & _MASK_128).random_raw(count)
    return np.ldexp((raw >> np.uint64(12)).astype(np.float64), -52)


@dataclass(frozen=True)
class SamplingTable:
    """The sampling parameters of B rows as tensors, with what can be skipped worked out once.

    temperature: float32 [B, 1], 1 where greedy; greedy: bool [B]; top_k: int64 [B, 1], V where off; top_p: [B, 1].
    cut: the rows that have a top-k or a top-p, int64, or None.
    """

    temperature: Tensor | None
    greedy: Tensor | None
    all_greedy: bool
    cut: Tensor | None
    top_k: Tensor
    top_p: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocabulary: int, device: torch.device) -> SamplingTable:
        """The table of the given rows."""
        greedy = [row.temperature == 0 for row in rows]
        temperature = [row.temperature or 1.0 for row in rows]
        cut = [
            index for index, row in enumerate(rows) if row.temperature and (row.top_p < 1 or 0 < row.top_k < vocabulary)
        ]
        return cls(
            temperature=None
            if all(value == 1 for value in temperature)
            else torch.tensor(temperature, device=device).unsqueeze(1),
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            all_greedy=all(greedy),
            cut=torch.tensor(cut, device=device) if cut else None,
            top_k=torch.tensor([rows[index].top_k or vocabulary for index in cut], device=device).unsqueeze(1),
            top_p=torch.tensor([rows[index].top_p for index in cut], device=device).unsqueeze(1),
        )


def sample(logits: Tensor, table: SamplingTable, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B] and their log-probabilities float32 [B], as `miles_core.sample.Sampling` defines them.

    logits: [B, V]; draws: float64 [B], one uniform number a row.
    """
    scaled = logits.float()
    if table.temperature is not None:
        scaled = scaled / table.temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    if table.all_greedy:
        tokens = logprobs.argmax(dim=-1, keepdim=True)
    else:
        tokens = _draw(logprobs, table, draws)
        if table.greedy is not None:
            tokens = torch.where(table.greedy.unsqueeze(1), logprobs.argmax(dim=-1, keepdim=True), tokens)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def _draw(logprobs: Tensor, table: SamplingTable, draws: Tensor) -> Tensor:
    """Inverse of the cumulative distribution at `draws`; int64 [B, 1]. Summed in float64, so rare tokens count."""
    probs = logprobs.exp()
    if table.cut is not None:
        probs[table.cut] = _cut(probs[table.cut], table.top_k, table.top_p)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, draws.unsqueeze(1) * cumulative[:, -1:], right=True)
    return tokens.clamp_(max=logprobs.shape[-1] - 1)  # past the end only if there are NaNs, which the caller reports


def _cut(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zeroes what top-k and then top-p leave out. Top-p keeps the fewest most likely tokens that reach `top_p`, of what
    top-k kept; at least one token stays."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    ordered = ordered.masked_fill(ranks >= top_k, 0.0)
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    ordered = ordered.masked_fill(before >= top_p * ordered.sum(dim=-1, keepdim=True, dtype=torch.float64), 0.0)
    return torch.zeros_like(probs).scatter(1, order, ordered)
