"""Figures of a run.

A request attains the SLO if its time to first token is within the TTFT target and its time per
token behind the first (ITL, the mean over the request) is within the ITL target; one that failed
or was not served does not. Latencies are over what was served. Replica-seconds count from asking
for a replica until it is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from paceline.autoscaler.values import POOLS
from paceline.cli.simulation.fleet import Change
from paceline.cli.simulation.meters import quantile_s
from paceline.cli.simulation.sequence import Sequence
from paceline.cli.simulation.simulation import Outcome
from paceline.domain.member import Role


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run comes to. None: nobody was served."""

    slo_attainment: float
    """Share of all requests that were served within both targets."""
    ttft_attainment: float
    itl_attainment: float
    replica_seconds: float
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p95_s: float | None
    itl_p99_s: float | None
    """Over requests, of their time per token."""
    gap_p99_s: float | None
    """Over gaps between pieces of all streams."""
    e2e_p50_s: float | None
    e2e_p99_s: float | None
    requests: int
    failed: int
    failures: dict[str, int]
    scale_events: int
    max_replicas: int
    """Most replicas asked for at a time, of all pools."""
    mean_prefill: float
    mean_decode: float
    prefill_replica_seconds: float
    decode_replica_seconds: float
    migrations: int
    """Times that a stream went on on another worker."""
    decode_only_ratio: float
    """Share of prompts that the decode worker computed."""
    cached_ratio: float
    """Share of prompt tokens found in a store."""
    duration_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values, rounded."""
        return {key: _rounded(value) for key, value in asdict(self).items()}


def figures(outcome: Outcome) -> Figures:
    """Return the figures of a run."""
    options, requests = outcome.options, outcome.requests
    served = [r for r in requests if not r.failure]
    ttft = sorted(_known(r.ttft_s for r in served))
    itl = sorted(_known(r.itl_s for r in served))
    e2e = sorted(_known(r.e2e_s for r in served))
    is_ttft = [is_ttft_within(r, options.slo_ttft_s) for r in requests]
    is_itl = [is_itl_within(r, options.slo_itl_s) for r in requests]
    total = len(requests)
    prompt_tokens = sum(r.arrival.prompt_tokens for r in requests)
    seconds, duration_s = outcome.replica_seconds, max(outcome.end_s, 1e-9)
    return Figures(
        slo_attainment=sum(map(all, zip(is_ttft, is_itl, strict=True))) / total,
        ttft_attainment=sum(is_ttft) / total,
        itl_attainment=sum(is_itl) / total,
        replica_seconds=sum(seconds.values()),
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p95_s=quantile(ttft, 0.95),
        ttft_p99_s=quantile(ttft, 0.99),
        itl_p50_s=quantile(itl, 0.5),
        itl_p95_s=quantile(itl, 0.95),
        itl_p99_s=quantile(itl, 0.99),
        gap_p99_s=quantile_s(outcome.meters.gaps.counts, 0.99),
        e2e_p50_s=quantile(e2e, 0.5),
        e2e_p99_s=quantile(e2e, 0.99),
        requests=total,
        failed=total - len(served),
        failures=dict(Counter(r.failure for r in requests if r.failure)),
        scale_events=outcome.scale_events,
        max_replicas=most_replicas(outcome.changes),
        mean_prefill=seconds[Role.PREFILL] / duration_s,
        mean_decode=seconds[Role.DECODE] / duration_s,
        prefill_replica_seconds=seconds[Role.PREFILL],
        decode_replica_seconds=seconds[Role.DECODE],
        migrations=sum(r.migrations for r in requests),
        decode_only_ratio=sum(not r.prefill_worker for r in served) / max(1, len(served)),
        cached_ratio=sum(r.cached_tokens or 0 for r in requests) / prompt_tokens,
        duration_s=outcome.end_s,
    )


def is_ttft_within(request: Sequence, slo_ttft_s: float) -> bool:
    """Tell whether a request was served, and its first token came in time."""
    ttft_s = request.ttft_s
    return not request.failure and ttft_s is not None and ttft_s <= slo_ttft_s


def is_itl_within(request: Sequence, slo_itl_s: float) -> bool:
    """Tell whether a request was served, and its tokens came fast enough."""
    return not request.failure and (request.itl_s or 0.0) <= slo_itl_s


def quantile(ordered: list[float], share: float) -> float | None:
    """Return the smallest value that this share of all does not exceed."""
    if not ordered:
        return None
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


def most_replicas(changes: Iterable[Change]) -> int:
    """Return the most replicas that were asked for at a time."""
    now, most = dict.fromkeys(POOLS, 0), 0
    for change in changes:
        now[change.role] = change.requested
        most = max(most, sum(now.values()))
    return most


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
