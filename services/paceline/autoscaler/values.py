"""What scaling sees and what it decides: plain values, no I/O.

sources/ and the simulator make an `Observation`, a policy (policies/) turns it into a `Decision`,
targets/ carry that out. `Observation` holds only what a source really knows: what it could not
find out is None and named in `problems`, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from paceline.domain.cost import StepCost
from paceline.domain.member import Role

POOLS = (Role.PREFILL, Role.DECODE)
"""Roles that are scaled."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What clients asked for in the last `window_s`."""

    window_s: float
    requests_per_s: float
    """Arrivals, those that were refused or parked included."""
    prompt_tokens: float
    """Mean per request."""
    prompt_tokens_p95: float
    cached_ratio: float
    """Share of prompt tokens whose KV was found in a cache, 0..1."""
    output_tokens: float
    """Mean per request."""
    emitted_per_step: float = 1.0
    """Tokens per pass of the target and sequence: 1 without drafts."""
    nodes_per_step: float = 0.0
    """Draft tokens verified per pass and sequence."""


@dataclass(frozen=True, slots=True)
class Latency:
    """What clients got in the last window; None where nobody was served."""

    ttft_p95_s: float | None = None
    itl_p95_s: float | None = None
    ttft_within_ratio: float | None = None
    """Share of requests within the TTFT target, 0..1."""
    itl_within_ratio: float | None = None
    """Share of gaps within the ITL target, 0..1."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of a pool, as its membership tells."""

    id: str
    is_draining: bool = False
    num_running: int = 0
    num_waiting: int = 0
    pending_prefill_tokens: int = 0
    context_tokens: int = 0
    """KV of running sequences, in tokens: what would have to move or be computed again."""
    free_blocks: int = 0
    total_blocks: int = 0
    age_s: float = 0.0
    """Seconds since it became ready."""


@dataclass(frozen=True, slots=True)
class Replica:
    """What one worker of a pool can do."""

    step_cost: StepCost
    chunk_tokens: int
    """Tokens of a prompt that one step computes at most."""
    max_rows: int
    """Sequences that run at a time."""
    kv_tokens: int
    """Tokens whose KV fits."""


@dataclass(frozen=True, slots=True)
class Pool:
    """One scaled role."""

    requested: int
    """Replicas that the target was last asked for; it may have been somebody else who asked."""
    workers: tuple[Worker, ...] = ()
    """Those that announce themselves, draining ones included."""
    replica: Replica | None = None
    """None until a worker of the pool was seen."""
    busy_ratio: float | None = None
    """Share of the window that workers spent in steps, 0..1, mean over the pool."""

    @property
    def ready(self) -> int:
        """Workers that take requests."""
        return sum(not worker.is_draining for worker in self.workers)

    @property
    def starting(self) -> int:
        """Replicas that were asked for and are not there yet."""
        return max(0, self.requested - self.ready)


@dataclass(frozen=True, slots=True)
class Observation:
    """The platform at one moment."""

    at_s: float
    """Of the clock that the policy lives by; it never goes back."""
    pools: Mapping[Role, Pool]
    traffic: Traffic | None = None
    latency: Latency = Latency()
    parked: int = 0
    """Requests that the gateways hold because no worker is there."""
    problems: tuple[str, ...] = ()
    """What could not be found out, and why; not empty means: hold."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Replica counts, and why."""

    at_s: float
    replicas: Mapping[Role, int]
    reason: str
    """One line with the numbers that decided."""
    kind: str
    """Short and stable, a metric's label: see `KINDS`."""
    victims: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    """Workers to end first where a pool shrinks, cheapest loss first."""
    inputs: Mapping[str, float] = field(default_factory=dict)
    """Every number that went in, by the name it has in the metrics and on the dashboard."""


KINDS = ("steady", "grow", "shrink", "hold", "wake", "sleep", "limited")
"""hold: data is missing or stale; wake, sleep: from and to zero; limited: a bound or the budget
allows less than is needed."""
