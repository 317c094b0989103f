"""How many workers of each role a platform has, and who ends when there are to be fewer.

A pool has what it was last asked for, always: workers start and end in the background, and a
crashed one comes back by itself. Ids are taken from the lowest free number, and are free again
once their process is gone. cli/fleet_control.py lets an autoscaler ask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from paceline.cli.child import ChildSpec
from paceline.cli.supervisor import Supervisor
from paceline.domain.errors import InvalidRequestError

logger = logging.getLogger(__name__)

POOLS = ("prefill", "decode")
"""Roles that can be scaled."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """The workers of one role."""

    role: str
    member_ids: tuple[str, ...]
    """Those that run or start, oldest first."""
    ending_ids: tuple[str, ...]
    """Those that drain."""


class WorkerPools:
    """Starts and ends the workers of one platform. Calls take effect at once, one by one."""

    def __init__(
        self, supervisor: Supervisor, make_spec: Callable[[str, int], ChildSpec], max_workers: int
    ) -> None:
        """`make_spec` returns the worker of a role and number; a pool has `max_workers` at most."""
        self._supervisor = supervisor
        self._make_spec = make_spec
        self._max_workers = max_workers

    def state(self, role: str) -> PoolState:
        """Return a pool as it is."""
        children = self._supervisor.of_role(role)
        return PoolState(
            role,
            tuple(c.spec.name for c in children if not c.is_stopping),
            tuple(c.spec.name for c in children if c.is_stopping),
        )

    def scale(self, role: str, replicas: int, victims: Sequence[str] = ()) -> PoolState:
        """Give a pool a size; asking again changes nothing.

        Raises:
            InvalidRequestError: there is no such pool, or it may not be so large.
        """
        if role not in POOLS:
            raise InvalidRequestError("role", f"{role!r} is no pool; pools are {', '.join(POOLS)}")
        if replicas > self._max_workers:
            raise InvalidRequestError(
                "replicas", f"{replicas}, at most {self._max_workers} (--max-workers) may run"
            )
        running = self.state(role).member_ids
        leaving = choose_victims(running, len(running) - replicas, victims)
        for child in self._supervisor.of_role(role):
            if child.spec.name in leaving:
                self._supervisor.end(child)
        for _ in range(replicas - len(running)):
            taken = {child.spec.name for child in self._supervisor.of_role(role)}
            self._supervisor.start(self._make_spec(role, free_number(role, taken)))
        if replicas != len(running):
            fields = {"role": role, "replicas": replicas, "before": len(running)}
            logger.info("scaled", extra={"fields": {**fields, "ending": sorted(leaving)}})
        return self.state(role)


def choose_victims(running: Sequence[str], count: int, named: Sequence[str]) -> set[str]:
    """Return `count` of the running workers: those that are named, in order, then the youngest."""
    wanted = [name for name in dict.fromkeys(named) if name in running]
    youngest = [name for name in reversed(running) if name not in wanted]
    return set([*wanted, *youngest][: max(0, count)])


def free_number(role: str, taken: Collection[str]) -> int:
    """Return the lowest number with which an id of a role is free."""
    number = 0
    while f"{role}-{number}" in taken:
        number += 1
    return number
