"""What a scaling policy gets to see: rates over a window, late, by scrapes, as from Prometheus.

Every `scrape_s` all counters are read. An observation is made of the newest scrape that is
`lag_scrapes` old and the one `window_s` before it. Who is there, with what load, and how many
requests are parked is known at once: members tell it themselves, as in the running platform. A
mean over requests of which there were none in the window is the last one there was. While a
blackout lasts there are no rates and no latencies, and `problems` says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from paceline.autoscaler.values import POOLS, Latency, Observation, Pool, Traffic
from paceline.autoscaler.values import Worker as SeenWorker
from paceline.cli.simulation.events import EventQueue
from paceline.cli.simulation.fleet import Fleet
from paceline.cli.simulation.meters import Meters, quantile_s
from paceline.domain.member import Role

_NO_SCRAPE = "prometheus-missing: there are no two scrapes yet"
_BLACKOUT = "prometheus-unreachable: blackout"


@dataclass(frozen=True, slots=True)
class ScrapeOptions:
    """How metrics reach the policy."""

    scrape_s: float = 5.0
    window_s: float = 30.0
    lag_scrapes: int = 1
    blackouts: tuple[tuple[float, float], ...] = ()
    """Start and duration, in seconds."""

    def is_dark(self, at_s: float) -> bool:
        """Tell whether the source fails at a moment."""
        return any(start_s <= at_s < start_s + length_s for start_s, length_s in self.blackouts)


@dataclass(frozen=True, slots=True)
class _Scrape:
    at_s: float
    counters: Mapping[str, float]
    ttft: tuple[int, ...]
    gaps: tuple[int, ...]
    busy_s: Mapping[Role, float]
    worker_s: Mapping[Role, float]


_COUNTERS = (
    "num_arrivals",
    "prompt_tokens",
    "routed_tokens",
    "cached_tokens",
    "num_ended",
    "output_tokens",
    "num_pieces",
    "piece_tokens",
    "num_first_tokens",
    "num_ttft_within",
    "num_gaps_within",
)


class Observer:
    """Scrapes, and makes observations."""

    def __init__(
        self, fleet: Fleet, meters: Meters, events: EventQueue, options: ScrapeOptions, nodes: int
    ) -> None:
        """`nodes` are the draft tokens of a sequence in a step."""
        self._fleet = fleet
        self._meters = meters
        self._events = events
        self._options = options
        self._nodes = nodes
        num_kept = 3 + options.lag_scrapes + int(options.window_s / options.scrape_s)
        self._scrapes: deque[_Scrape] = deque(maxlen=num_kept)
        self._means = {"prompt": 0.0, "prompt_p95": 0.0, "output": 0.0, "cached": 0.0}
        self._emitted = 1.0

    def scrape(self) -> None:
        """Read all counters."""
        now_s, meters = self._events.now_s, self._meters
        busy = dict.fromkeys(POOLS, 0.0)
        time = dict.fromkeys(POOLS, 0.0)
        for worker in (*self._fleet.workers.values(), *self._fleet.gone):
            if worker.ready_s is not None:
                busy[worker.role] += worker.engine.busy_until_now_s()
                end_s = now_s if worker.gone_s is None else worker.gone_s
                time[worker.role] += end_s - worker.ready_s
        self._scrapes.append(
            _Scrape(
                at_s=now_s,
                counters={name: float(getattr(meters, name)) for name in _COUNTERS},
                ttft=tuple(meters.ttft.counts),
                gaps=tuple(meters.gaps.counts),
                busy_s=busy,
                worker_s=time,
            )
        )

    def observe(self, parked: int) -> Observation:
        """Return what is known now."""
        now_s, options = self._events.now_s, self._options
        pair = None if options.is_dark(now_s) else self._window()
        if pair is None:
            dark = _BLACKOUT if options.is_dark(now_s) else _NO_SCRAPE
            pools = {role: self._pool(role, None, None) for role in POOLS}
            return Observation(now_s, pools, parked=parked, problems=(dark,))
        first, last = pair
        return Observation(
            at_s=now_s,
            pools={role: self._pool(role, first, last) for role in POOLS},
            traffic=self._traffic(first, last),
            latency=self._latency(first, last),
            parked=parked,
        )

    def _window(self) -> tuple[_Scrape, _Scrape] | None:
        options = self._options
        newest_s = self._events.now_s - options.lag_scrapes * options.scrape_s
        known = [scrape for scrape in self._scrapes if scrape.at_s <= newest_s + 1e-9]
        if len(known) < 2:
            return None
        last = known[-1]
        since_s = last.at_s - options.window_s - 1e-9
        first = next(scrape for scrape in known if scrape.at_s >= since_s)
        return (first, last) if first is not last else None

    def _traffic(self, first: _Scrape, last: _Scrape) -> Traffic:
        def grown(name: str) -> float:
            return last.counters[name] - first.counters[name]

        means, arrivals, ended = self._means, grown("num_arrivals"), grown("num_ended")
        if arrivals:
            means["prompt"] = grown("prompt_tokens") / arrivals
            p95 = self._meters.prompt_p95(first.at_s, last.at_s)
            means["prompt_p95"] = means["prompt"] if p95 is None else p95
        if ended:
            means["output"] = grown("output_tokens") / ended
        if grown("routed_tokens"):
            means["cached"] = grown("cached_tokens") / grown("routed_tokens")
        if grown("num_pieces"):
            self._emitted = grown("piece_tokens") / grown("num_pieces")
        return Traffic(
            window_s=last.at_s - first.at_s,
            requests_per_s=arrivals / (last.at_s - first.at_s),
            prompt_tokens=means["prompt"],
            prompt_tokens_p95=means["prompt_p95"],
            cached_ratio=means["cached"],
            output_tokens=means["output"],
            emitted_per_step=self._emitted,
            nodes_per_step=float(self._nodes),
        )

    def _latency(self, first: _Scrape, last: _Scrape) -> Latency:
        ttft = [b - a for a, b in zip(first.ttft, last.ttft, strict=True)]
        gaps = [b - a for a, b in zip(first.gaps, last.gaps, strict=True)]
        served = last.counters["num_first_tokens"] - first.counters["num_first_tokens"]
        pieces = last.counters["num_pieces"] - first.counters["num_pieces"]
        ttft_within = last.counters["num_ttft_within"] - first.counters["num_ttft_within"]
        gaps_within = last.counters["num_gaps_within"] - first.counters["num_gaps_within"]
        return Latency(
            ttft_p95_s=quantile_s(ttft, 0.95),
            itl_p95_s=quantile_s(gaps, 0.95),
            ttft_within_ratio=ttft_within / served if served else None,
            itl_within_ratio=gaps_within / pieces if pieces else None,
        )

    def _pool(self, role: Role, first: _Scrape | None, last: _Scrape | None) -> Pool:
        busy = None
        if first is not None and last is not None:
            time_s = last.worker_s[role] - first.worker_s[role]
            if time_s > 0:
                busy = min(1.0, (last.busy_s[role] - first.busy_s[role]) / time_s)
        return Pool(
            requested=self._fleet.requested(role),
            workers=self._workers(role),
            replica=self._fleet.profile.replica,
            busy_ratio=busy,
        )

    def _workers(self, role: Role) -> tuple[SeenWorker, ...]:
        seen = []
        for worker in self._fleet.workers.values():
            if worker.role is not role or worker.ready_s is None:
                continue
            load = worker.load()
            seen.append(
                SeenWorker(
                    id=worker.id,
                    is_draining=worker.is_draining,
                    num_running=load.num_running,
                    num_waiting=load.num_waiting,
                    pending_prefill_tokens=load.pending_prefill_tokens,
                    context_tokens=load.context_tokens,
                    free_blocks=load.free_blocks,
                    total_blocks=load.total_blocks,
                    age_s=self._events.now_s - worker.ready_s,
                )
            )
        return tuple(seen)
