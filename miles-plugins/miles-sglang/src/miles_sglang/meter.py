"""What a server measures of itself: its page of metrics for Prometheus, as numbers of a run.

What it counts is exact, and read once a step. What only is so at a moment, such as the length of its queue, is 0 again
when a batch is complete, so samples are taken while it generates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean

from miles_core.roles import Measures, Quotient

COUNTED: Mapping[str, str] = {
    "prompt_tokens": "sglang:prompt_tokens_total",
    "cached_tokens": "sglang:cached_tokens_total",
    "retractions": "sglang:num_retracted_requests_total",
}
"""Name -> the server's counter."""
SHARES: Mapping[str, tuple[str, str]] = {
    "cache_hit_rate": ("sglang:cached_tokens_total", "sglang:prompt_tokens_total"),
    "time_to_first_token_seconds": (
        "sglang:time_to_first_token_seconds_sum",
        "sglang:time_to_first_token_seconds_count",
    ),
    "inter_token_seconds": ("sglang:inter_token_latency_seconds_sum", "sglang:inter_token_latency_seconds_count"),
}
"""Name -> the server's counters whose quotient it is."""
SAMPLED: Mapping[str, str] = {
    "running_requests": "sglang:num_running_reqs",
    "queued_requests": "sglang:num_queue_reqs",
    "kv_usage": "sglang:token_usage",
}
"""Name -> what the server says of a moment."""
GENERATED = "sglang:generation_tokens_total"


class Meter:
    """One server's, from its start on. Pages are text as `/metrics` gives it."""

    def __init__(self) -> None:
        self._before: Counter[str] = Counter()
        self._seconds = 0.0
        self._samples: list[Mapping[str, float]] = []

    def sample(self, page: str) -> None:
        """A moment at which it generates."""
        found = _read(page)
        self._samples.append({name: fmean(found[said]) for name, said in SAMPLED.items() if said in found})

    def take(self, page: str, busy_seconds: float) -> Measures:
        """What there is to say of the time since the last call. busy_seconds: that it has computed in all."""
        now = Counter({said: sum(values) for said, values in _read(page).items()})
        new = {said: value - self._before[said] for said, value in now.items()}
        seconds = busy_seconds - self._seconds
        samples, self._samples = self._samples, []
        self._before, self._seconds = now, busy_seconds
        return {
            **{name: new.get(said, 0.0) for name, said in COUNTED.items()},
            **{name: Quotient(new.get(part, 0.0), new.get(whole, 0.0)) for name, (part, whole) in SHARES.items()},
            "tokens_per_second": Quotient(new.get(GENERATED, 0.0), seconds),
            **{name: Quotient(sum(found), len(found)) for name, found in _columns(samples).items()},
        }


def _read(page: str) -> dict[str, list[float]]:
    """The values of each name, one for each set of labels."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(float(sample.value))
    return found


def _columns(samples: list[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [sample[name] for sample in samples if name in sample] for name in SAMPLED}
