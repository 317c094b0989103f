"""Runs one load against one scaling policy, and says what came of every request.

The policy is asked every `period_s`, and at once when a request is parked for want of any worker.
What it decides is carried out without delay; only replicas take their time to start. The run ends
with the last request, and replicas cost until then.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from paceline.autoscaler.policies.base import ScalingPolicy
from paceline.autoscaler.values import POOLS, Decision
from paceline.cli.simulation.drafting import Drafting
from paceline.cli.simulation.engine import MAX_STEPS, Engine
from paceline.cli.simulation.events import EventQueue
from paceline.cli.simulation.fleet import Change, Fleet, FleetOptions, Worker
from paceline.cli.simulation.gateway import Gateway
from paceline.cli.simulation.meters import Meters
from paceline.cli.simulation.observing import Observer, ScrapeOptions
from paceline.cli.simulation.profiles import Profile
from paceline.cli.simulation.rows import MOST_RESIDUE
from paceline.cli.simulation.sequence import Sequence
from paceline.cli.simulation.store import prefix_keys
from paceline.cli.simulation.traces import Arrival
from paceline.domain.member import Role
from paceline.gateway.routing import create_policy

_WAKE_DELAY_S = 0.1
"""From the first parked request to a decision."""
_MIN_WAKE_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """The world that a policy is put into."""

    profile: Profile
    slo_ttft_s: float = 2.0
    slo_itl_s: float = 0.05
    initial: Mapping[Role, int] = field(default_factory=lambda: dict.fromkeys(POOLS, 1))
    """Replicas that are ready when the load begins."""
    fleet: FleetOptions = field(default_factory=FleetOptions)
    scrape: ScrapeOptions = field(default_factory=ScrapeOptions)
    drafting: Drafting = field(default_factory=Drafting)
    period_s: float = 5.0
    """Between two decisions."""
    deadline_s: float = 300.0
    """Requests that took longer have failed; as in the gateway's settings."""
    seed: int = 0
    max_steps: int = MAX_STEPS
    """Most steps taken as one, see engine.py."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run brought."""

    options: SimulationOptions
    requests: tuple[Sequence, ...]
    decisions: tuple[Decision, ...]
    """All of them, steady ones included."""
    changes: tuple[Change, ...]
    replica_seconds: Mapping[Role, float]
    end_s: float
    scale_events: int
    """Decisions that changed a pool's size, counted per pool."""
    meters: Meters
    workers: tuple[Worker, ...]
    """All there ever were."""
    calls_left: Mapping[str, int]
    """Worker -> calls of the gateway that did not end; zeros."""


class Simulation:
    """One run."""

    def __init__(
        self,
        load: tuple[Arrival, ...],
        policy: ScalingPolicy,
        options: SimulationOptions,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        """`on_progress` hears the share of requests that have ended, now and then."""
        self._load = load
        self._policy = policy
        self._options = options
        self._on_progress = on_progress
        self._events = EventQueue()
        self._meters = Meters(options.slo_ttft_s, options.slo_itl_s)
        self._fleet = Fleet(
            options.profile, options.fleet, self._events, self._make_engine, self._note_ready
        )
        self._gateway = Gateway(
            self._fleet,
            create_policy("cost"),
            self._events,
            self._meters,
            options.deadline_s,
            self._note_parked,
        )
        nodes = options.drafting.nodes
        self._observer = Observer(self._fleet, self._meters, self._events, options.scrape, nodes)
        self._sequences = _sequences(load, options.seed)
        self._decisions: list[Decision] = []
        self._scale_events = 0
        self._decided_s = -math.inf
        self._is_wake_due = False
        self._num_arrived = 0

    def run(self) -> Outcome:
        """Play the load to its end."""
        options, events = self._options, self._events
        self._fleet.start_with(options.initial)
        if self._sequences:
            events.at(self._load[0].at_s, self._arrive)
        events.at(0.0, self._scrape)
        events.at(options.period_s, self._tick)
        events.run(lambda: self._gateway.num_ended == len(self._sequences))
        if self._on_progress is not None:
            self._on_progress(1.0)
        return Outcome(
            options=options,
            requests=tuple(self._sequences),
            decisions=tuple(self._decisions),
            changes=tuple(self._fleet.changes),
            replica_seconds=self._fleet.replica_seconds(events.now_s),
            end_s=events.now_s,
            scale_events=self._scale_events,
            meters=self._meters,
            workers=(*self._fleet.gone, *self._fleet.workers.values()),
            calls_left=self._gateway.in_flight,
        )

    # -- what happens ---------------------------------------------------------------------

    def _arrive(self) -> None:
        sequence = self._sequences[self._num_arrived]
        self._num_arrived += 1
        if self._num_arrived < len(self._sequences):
            self._events.at(self._load[self._num_arrived].at_s, self._arrive)
        self._gateway.arrive(sequence)

    def _scrape(self) -> None:
        self._observer.scrape()
        self._events.at(self._events.now_s + self._options.scrape.scrape_s, self._scrape)

    def _tick(self) -> None:
        self._decide()
        if self._on_progress is not None:
            self._on_progress(self._gateway.num_ended / len(self._sequences))
        self._events.at(self._events.now_s + self._options.period_s, self._tick)

    def _decide(self) -> None:
        self._decided_s = self._events.now_s
        decision = self._policy.decide(self._observer.observe(len(self._gateway.parked)))
        self._decisions.append(decision)
        for role, size in decision.replicas.items():
            victims = decision.victims.get(role, ())
            self._scale_events += self._fleet.resize(role, max(0, size), victims)

    def _note_parked(self) -> None:
        if self._is_wake_due or self._fleet.requested(Role.DECODE):
            return
        self._is_wake_due = True
        earliest_s = self._decided_s + _MIN_WAKE_PAUSE_S
        self._events.at(max(self._events.now_s + _WAKE_DELAY_S, earliest_s), self._wake)

    def _wake(self) -> None:
        self._is_wake_due = False
        if self._gateway.parked:
            self._decide()

    def _note_ready(self, worker: Worker) -> None:
        if worker.role is Role.DECODE:
            self._gateway.note_ready()

    def _make_engine(self, role: Role) -> Engine:
        options, is_prefill = self._options, role is Role.PREFILL
        drafting, nodes = options.drafting, options.drafting.nodes

        def emission(at_s: float) -> tuple[float, int]:
            return drafting.emitted_per_step(at_s), nodes

        return Engine(
            options.profile.replica,
            options.profile.mixed_step_ratio,
            self._events,
            self._gateway,
            is_prefill=is_prefill,
            emission=emission,
            deadline_s=options.deadline_s,
            max_steps=options.max_steps,
        )


def simulate(
    load: tuple[Arrival, ...],
    policy: ScalingPolicy,
    options: SimulationOptions,
    on_progress: Callable[[float], None] | None = None,
) -> Outcome:
    """Return what a policy makes of a load."""
    return Simulation(load, policy, options, on_progress).run()


def _sequences(load: tuple[Arrival, ...], seed: int) -> list[Sequence]:
    draw = random.Random(f"{seed}/residues")
    return [
        Sequence(
            id=number,
            arrival=arrival,
            context=arrival.prompt_tokens,
            left=arrival.output_tokens,
            residue=draw.uniform(0.0, MOST_RESIDUE),
            prefix=prefix_keys(arrival),
        )
        for number, arrival in enumerate(load)
    ]
