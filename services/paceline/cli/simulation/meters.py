"""Counters and histograms of a simulated platform, as its processes would export them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence as Values
from dataclasses import dataclass, field

from paceline.cli.simulation.sequence import Sequence
from paceline.cli.simulation.traces import Arrival

_FIRST_EDGE_S = 0.0005
_EDGE_RATIO = 1.02
"""Buckets are this far apart: quantiles are 1 % off at most, where Prometheus' are coarser."""
_NUM_EDGES = 900


_EDGES = [_FIRST_EDGE_S * _EDGE_RATIO**i for i in range(_NUM_EDGES)]
_LOG_RATIO = math.log(_EDGE_RATIO)


@dataclass(slots=True)
class Histogram:
    """Counts of seconds by fine buckets."""

    counts: list[int] = field(default_factory=lambda: [0] * (_NUM_EDGES + 1))

    def add(self, seconds: float, count: int = 1) -> None:
        """Count values."""
        if seconds <= _FIRST_EDGE_S:
            self.counts[0] += count
            return
        place = math.ceil(math.log(seconds / _FIRST_EDGE_S) / _LOG_RATIO - 1e-9)
        self.counts[min(place, _NUM_EDGES)] += count


def quantile_s(counts: Values[int], share: float) -> float | None:
    """Return a quantile of bucket counts, linear within its bucket; None of nothing."""
    total = sum(counts)
    if total <= 0:
        return None
    rank, below = share * total, 0
    for place, count in enumerate(counts):
        if count and below + count >= rank:
            low = _EDGES[place - 1] if place else 0.0
            high = _EDGES[min(place, _NUM_EDGES - 1)]
            return low + (high - low) * max(0.0, rank - below) / count
        below += count
    return _EDGES[-1]


@dataclass(slots=True)
class Meters:
    """Everything counted, since the start."""

    slo_ttft_s: float
    slo_itl_s: float
    num_arrivals: int = 0
    prompt_tokens: int = 0
    num_routed: int = 0
    """Prompts that were looked up in the store."""
    routed_tokens: int = 0
    cached_tokens: int = 0
    num_ended: int = 0
    output_tokens: int = 0
    """Of requests that ended."""
    num_pieces: int = 0
    """Steps times streams."""
    piece_tokens: float = 0.0
    num_first_tokens: int = 0
    num_ttft_within: int = 0
    num_gaps_within: int = 0
    ttft: Histogram = field(default_factory=Histogram)
    gaps: Histogram = field(default_factory=Histogram)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When, and tokens of the prompt."""

    def note_arrival(self, arrival: Arrival, at_s: float) -> None:
        """Count a request that came."""
        self.num_arrivals += 1
        self.prompt_tokens += arrival.prompt_tokens
        self.arrivals.append((at_s, arrival.prompt_tokens))

    def note_cached(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Count a prompt that was looked up in the store."""
        self.num_routed += 1
        self.routed_tokens += prompt_tokens
        self.cached_tokens += cached_tokens

    def note_first_token(self, ttft_s: float) -> None:
        """Count a time to first token."""
        self.num_first_tokens += 1
        self.num_ttft_within += ttft_s <= self.slo_ttft_s
        self.ttft.add(ttft_s)

    def note_gaps(self, count: int, emitted: float, gap_s: float) -> None:
        """Count gaps between pieces of `emitted` tokens."""
        self.num_pieces += count
        self.piece_tokens += count * emitted
        if gap_s <= self.slo_itl_s:
            self.num_gaps_within += count
        self.gaps.add(gap_s, count)

    def note_end(self, sequence: Sequence) -> None:
        """Count a request that ended."""
        self.num_ended += 1
        if not sequence.failure:
            self.output_tokens += sequence.arrival.output_tokens

    def prompt_p95(self, since_s: float, until_s: float) -> float | None:
        """Return the 95th percentile of prompts that came in a window."""
        first = bisect_right(self.arrivals, (since_s, math.inf))
        last = bisect_right(self.arrivals, (until_s, math.inf))
        lengths = sorted(tokens for _, tokens in self.arrivals[first:last])
        return float(lengths[int(0.95 * (len(lengths) - 1))]) if lengths else None
