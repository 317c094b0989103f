"""Replicas of both roles: asked for, starting, ready, draining, gone.

A replica costs from the moment it is asked for until it is gone: a pod holds its device while it
starts and while it drains. It is ready after the start-up time, drawn once around the mean. Where
a pool shrinks, those the decision names go first, then those that still start, newest first, as a
Deployment's controller does, then the newest ready ones. Who leaves takes no new requests at once,
ends when nothing is left to do, and hands its sequences over when the grace time is up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from paceline.autoscaler.values import POOLS
from paceline.cli.simulation.engine import Engine
from paceline.cli.simulation.events import EventQueue
from paceline.cli.simulation.profiles import Profile
from paceline.cli.simulation.store import NodeStore
from paceline.domain.cost import StepCost
from paceline.domain.member import Load, Member, Role

SNAPSHOT_S = 0.1
"""Age up to which gateways go by a worker's last report: workers report ten times a second."""


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How replicas come and go."""

    start_up_s: float = 60.0
    start_up_spread: float = 0.1
    """Start-up times lie this share around the mean."""
    drain_grace_s: float = 25.0
    """As in the worker's settings."""
    seed: int = 0


@dataclass(slots=True)
class Worker:
    """One replica."""

    member: Member
    engine: Engine
    requested_s: float
    ready_s: float | None = None
    gone_s: float | None = None
    is_draining: bool = False
    has_evicted: bool = False
    """Whether its grace is over."""
    num_incoming: int = 0
    """Sequences whose KV is on its way."""
    incoming_tokens: int = 0
    """Prompt tokens that those have to compute."""
    snapshot_s: float = -1.0

    @property
    def id(self) -> str:
        """The member's id."""
        return self.member.id

    @property
    def role(self) -> Role:
        """The member's role."""
        return self.member.role

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.ready_s is not None and self.gone_s is None and not self.is_draining

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.engine.is_empty and not self.num_incoming

    def load(self) -> Load:
        """Return its load, what is on its way included."""
        load = self.engine.load()
        if not self.num_incoming:
            return load
        return replace(
            load,
            num_waiting=load.num_waiting + self.num_incoming,
            pending_prefill_tokens=load.pending_prefill_tokens + self.incoming_tokens,
        )

    def seen(self, now_s: float) -> Member:
        """Return the member as gateways see it."""
        if now_s - self.snapshot_s >= SNAPSHOT_S:
            self.snapshot_s = now_s
            self.member = self.member.with_load(self.load())
        return self.member


MakeEngine = Callable[[Role], Engine]


@dataclass(slots=True)
class Change:
    """Sizes of a pool from a moment on."""

    at_s: float
    role: Role
    requested: int
    ready: int


@dataclass(slots=True)
class Fleet:
    """All replicas that there ever were."""

    profile: Profile
    options: FleetOptions
    events: EventQueue
    make_engine: MakeEngine
    on_ready: Callable[[Worker], None] = lambda _: None
    workers: dict[str, Worker] = field(default_factory=dict)
    """Those that are not gone, by id."""
    gone: list[Worker] = field(default_factory=list)
    nodes: dict[str, NodeStore] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    _random: random.Random = field(default_factory=random.Random)
    _routing_cost: StepCost | None = None
    _num_started: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.options.seed}/start-up")

    # -- views ----------------------------------------------------------------------------

    def ready(self, role: Role) -> list[Worker]:
        """Return those that take requests."""
        return [w for w in self.workers.values() if w.role is role and w.is_ready]

    def requested(self, role: Role) -> int:
        """Return how many the pool is to have."""
        return sum(w.role is role and not w.is_draining for w in self.workers.values())

    def replica_seconds(self, end_s: float) -> dict[Role, float]:
        """Return the time of all replicas up to a moment."""
        total = dict.fromkeys(POOLS, 0.0)
        for worker in (*self.workers.values(), *self.gone):
            gone_s = end_s if worker.gone_s is None else min(worker.gone_s, end_s)
            total[worker.role] += max(0.0, gone_s - worker.requested_s)
        return total

    # -- sizes ----------------------------------------------------------------------------

    def start_with(self, sizes: Mapping[Role, int]) -> None:
        """Have replicas that are ready at once."""
        for role, size in sizes.items():
            for _ in range(size):
                self._become_ready(self._launch(role))

    def resize(self, role: Role, size: int, victims: Sequence[str] = ()) -> bool:
        """Give a pool another size; tell whether that changes anything."""
        staying = [w for w in self.workers.values() if w.role is role and not w.is_draining]
        for _ in range(size - len(staying)):
            worker = self._launch(role)
            spread = self.options.start_up_spread
            delay_s = self.options.start_up_s * self._random.uniform(1 - spread, 1 + spread)
            self.events.at(self.events.now_s + delay_s, self._become_ready, worker)
        surplus = max(0, len(staying) - size)
        named = {id_: place for place, id_ in enumerate(victims)}
        newest_first = staying[::-1]
        newest_first.sort(key=lambda w: (named.get(w.id, len(named)), w.ready_s is not None))
        for worker in newest_first[:surplus]:
            self._retire(worker)
        if size != len(staying):
            self._note(role)
        return size != len(staying)

    def check_gone(self, worker: Worker) -> None:
        """Let a worker end that drains and has nothing left to do."""
        if worker.is_draining and worker.gone_s is None and worker.is_idle:
            worker.gone_s = self.events.now_s
            del self.workers[worker.id]
            self.gone.append(worker)

    def _launch(self, role: Role) -> Worker:
        self._num_started += 1
        profile = self.profile
        taken: dict[str, int] = {}
        for worker in self.workers.values():
            taken[worker.member.node_id] = taken.get(worker.member.node_id, 0) + 1
        number = 0
        while taken.get(f"node-{number}", 0) >= profile.workers_per_node:
            number += 1
        node_id = f"node-{number}"
        self.nodes.setdefault(node_id, NodeStore(profile.store_tokens))
        member = Member(
            id=f"{role.value}-{self._num_started}",
            role=role,
            address="",
            pid=0,
            version="",
            node_id=node_id,
            step_cost=profile.replica.step_cost,
            prefill_chunk_tokens=profile.replica.chunk_tokens,
        )
        worker = Worker(member, self.make_engine(role), self.events.now_s)
        self.workers[worker.id] = worker
        return worker

    def _become_ready(self, worker: Worker) -> None:
        if worker.gone_s is None and not worker.is_draining:
            worker.ready_s = self.events.now_s
            self._note(worker.role)
            self.on_ready(worker)

    def _retire(self, worker: Worker) -> None:
        worker.is_draining = True
        self.check_gone(worker)
        if worker.gone_s is None:
            grace_s = self.options.drain_grace_s
            self.events.at(self.events.now_s + grace_s, self._end_grace, worker)

    def _end_grace(self, worker: Worker) -> None:
        if worker.gone_s is None:
            worker.has_evicted = True
            worker.engine.evict()

    def _note(self, role: Role) -> None:
        ready = sum(1 for _ in self.ready(role))
        self.changes.append(Change(self.events.now_s, role, self.requested(role), ready))
