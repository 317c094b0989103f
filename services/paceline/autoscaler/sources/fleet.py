"""Workers, gateways and parked requests, from the membership.

A list of members is believed only while this autoscaler finds its own record in it: a Redis that
lost its data answers with an empty fleet until everybody has announced itself again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from paceline.autoscaler.problems import problem
from paceline.autoscaler.values import POOLS, Replica, Worker
from paceline.domain.cost import StepShape
from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member, Role
from paceline.process.membership import Membership

_REFERENCE_ROWS = 8
"""Decoding rows of the step by which workers of a pool are compared."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who is there."""

    workers: Mapping[Role, tuple[Worker, ...]] = field(default_factory=dict)
    replicas: Mapping[Role, Replica] = field(default_factory=dict)
    """What a worker of each pool can do, as the last ones seen told."""
    ages_s: Mapping[Role, tuple[float, ...]] = field(default_factory=dict)
    """Seconds since each process was first seen, gateways included."""
    parked: int = 0
    problems: tuple[str, ...] = ()


class FleetSource:
    """Reads `Fleet`; keeps the last view while Redis is away."""

    def __init__(
        self,
        membership: Membership,
        own_id: str,
        own_epoch: Callable[[], int | None],
        timeout_s: float = 2.0,
    ) -> None:
        self._membership = membership
        self._own_id = own_id
        self._own_epoch = own_epoch
        self._timeout_s = timeout_s
        self._settle_s = membership.lease_s
        self._seen_s: dict[tuple[str, int], float] = {}
        self._complete_since_s: float | None = None
        self._view = Fleet()
        self._read_s: float | None = None

    async def read(self, now_s: float) -> Fleet:
        """Return the fleet; what is wrong with the view is named in its problems."""
        try:
            async with asyncio.timeout(self._timeout_s):
                members = await self._membership.members()
        except (UnavailableError, TimeoutError) as error:
            self._complete_since_s = None
            since = "never seen" if self._read_s is None else f"{now_s - self._read_s:.0f} s ago"
            text = f"{str(error) or 'timeout'}; workers as they were: {since}"
            return self._stale(problem("redis-unavailable", text))
        doubt = self._doubt(members, now_s)
        if doubt is not None and self._read_s is not None:
            return self._stale(doubt)
        view = self._view_of(members, now_s)
        if doubt is not None:
            return _with_problem(view, doubt)
        self._view, self._read_s = view, now_s
        return view

    def counts(self) -> dict[Role, int]:
        """Return the workers that take requests, as last seen."""
        workers = self._view.workers
        return {r: sum(not w.is_draining for w in workers.get(r, ())) for r in POOLS}

    async def num_parked(self) -> int:
        """Return how many requests wait at gateways; 0 where that cannot be found out."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return parked(await self._membership.members())
        except (UnavailableError, TimeoutError):
            return 0

    def _doubt(self, members: Sequence[Member], now_s: float) -> str | None:
        """Return why this list may lack members, None if it does not."""
        epoch = self._own_epoch()
        own = next((member for member in members if member.id == self._own_id), None)
        if own is None or epoch is None or own.epoch != epoch:
            self._complete_since_s = None
            taken = own is not None and epoch is not None and own.epoch > epoch
            text = "another autoscaler has taken over" if taken else "its own record is not there"
            return problem("fleet-incomplete", text)
        if self._complete_since_s is None:
            self._complete_since_s = now_s
        left_s = self._settle_s - (now_s - self._complete_since_s)
        if left_s > 0:
            return problem("fleet-incomplete", f"members have {left_s:.1f} s left to announce")
        return None

    def _stale(self, line: str) -> Fleet:
        return _with_problem(self._view, line)

    def _view_of(self, members: Sequence[Member], now_s: float) -> Fleet:
        self._seen_s = {
            key: self._seen_s.get(key, now_s) for key in ((m.id, m.epoch) for m in members)
        }
        replicas, problems = dict(self._view.replicas), []
        for role in POOLS:
            pool = [member for member in members if member.role is role]
            replica = replica_of(pool)
            if replica is not None:
                replicas[role] = replica
            elif pool:
                text = f"no {role.value} worker says what its steps cost and how many rows it has"
                problems.append(problem("fleet-untold", text))
        return Fleet(
            workers={
                role: tuple(self._worker(m, now_s) for m in members if m.role is role)
                for role in POOLS
            },
            replicas=replicas,
            ages_s={
                role: tuple(self._age_s(m, now_s) for m in members if m.role is role)
                for role in (Role.GATEWAY, *POOLS)
            },
            parked=parked(members),
            problems=tuple(problems),
        )

    def _age_s(self, member: Member, now_s: float) -> float:
        return now_s - self._seen_s[member.id, member.epoch]

    def _worker(self, member: Member, now_s: float) -> Worker:
        load = member.load
        return Worker(
            id=member.id,
            is_draining=member.is_draining,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            pending_prefill_tokens=load.pending_prefill_tokens,
            context_tokens=load.context_tokens,
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            age_s=self._age_s(member, now_s),
        )


def parked(members: Sequence[Member]) -> int:
    """Return how many requests gateways hold for want of a worker."""
    return sum(m.load.num_waiting for m in members if m.role is Role.GATEWAY)


def replica_of(pool: Sequence[Member]) -> Replica | None:
    """Return what a worker of the pool can do: the one of median speed stands for all."""
    told = [
        Replica(
            step_cost=member.step_cost,
            chunk_tokens=member.prefill_chunk_tokens,
            max_rows=member.max_rows,
            kv_tokens=member.load.total_blocks * member.model.block_size,
        )
        for member in pool
        if member.step_cost is not None
        and member.model is not None
        and member.max_rows > 0
        and member.prefill_chunk_tokens > 0
    ]
    told.sort(key=_reference_s)
    return told[(len(told) - 1) // 2] if told else None


def _reference_s(replica: Replica) -> float:
    """Return what a typical mixed step takes, to rank workers by."""
    shape = StepShape(rows=min(_REFERENCE_ROWS, replica.max_rows))
    return replica.step_cost.step_s(shape.with_chunk(replica.chunk_tokens, 0))


def _with_problem(view: Fleet, line: str) -> Fleet:
    return Fleet(view.workers, view.replicas, view.ages_s, view.parked, (*view.problems, line))
