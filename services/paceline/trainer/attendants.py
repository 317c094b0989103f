"""Who attends: the workers, what they said last, and the plan that all of them hear.

Owned by the event loop. trainer/server.py carries it over gRPC; the conductor publishes plans
and listens. What a worker says reaches the listeners in the same turn of the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from paceline.domain.drafts import DraftEntry, DraftState
from paceline.domain.errors import ExhaustedError
from paceline.domain.learnings import SequenceOutcome
from paceline.domain.slack import Slack
from paceline.process.metrics import Metrics

MAX_WORKERS = 4096
"""More are refused: every one hears every plan."""


@dataclass(slots=True)
class Attendant:
    """One worker, as it said last."""

    worker_id: str
    machine: str
    last_seen_s: float
    """By the clock of Attendants."""
    slack: Slack = field(default_factory=Slack)
    state: DraftState = field(default_factory=DraftState)


class Attendants:
    """All workers that attend now."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._present: dict[str, Attendant] = {}
        self._changed = asyncio.Event()
        self.plan: tuple[DraftEntry, ...] | None = None
        """What to draft with; None before the first `publish`."""
        self.number = 0
        """Counts plans."""
        self.is_closed = False
        self.on_outcomes: Callable[[str, Sequence[SequenceOutcome]], None] = lambda id_, done: None
        """Hears of a worker's sequences that ended."""
        self.on_slack: Callable[[str, str, Slack], None] = lambda id_, machine, slack: None
        """Hears what a worker on a machine could spare."""
        self.on_leave: Callable[[str], None] = lambda id_: None
        """Hears of a worker that is gone."""

    def __len__(self) -> int:
        return len(self._present)

    def present(self) -> list[Attendant]:
        """Return who attends, sorted by id."""
        return sorted(self._present.values(), key=lambda attendant: attendant.worker_id)

    def publish(self, plan: tuple[DraftEntry, ...]) -> None:
        """Let all workers hear a plan; one that is slow hears only the newest."""
        if plan != self.plan:
            self.plan = plan
            self.number += 1
            self._metrics.trainer_plan_number.set(self.number)
            self._wake()

    def close(self) -> None:
        """End all calls."""
        self.is_closed = True
        self._wake()

    async def until_news(self, number: int) -> None:
        """Wait for another plan than the one of this number, or for the end.

        The caller bounds the wait.
        """
        while self.number == number and not self.is_closed:
            await self._changed.wait()

    @contextmanager
    def attending(self, worker_id: str, machine: str) -> Iterator[Attendant]:
        """Book a worker for the time of its call; a newer call of the same id replaces it.

        Raises:
            ExhaustedError: too many attend.
        """
        if len(self._present) >= MAX_WORKERS and worker_id not in self._present:
            raise ExhaustedError(f"{MAX_WORKERS} workers attend", reason="too-many-workers")
        attendant = Attendant(worker_id, machine, self._clock())
        self._present[worker_id] = attendant
        self._metrics.trainer_workers.set(len(self._present))
        try:
            yield attendant
        finally:
            if self._present.get(worker_id) is attendant:
                del self._present[worker_id]
                self._metrics.trainer_workers.set(len(self._present))
                self.on_leave(worker_id)

    def note(
        self,
        attendant: Attendant,
        *,
        slack: Slack | None = None,
        outcomes: Sequence[SequenceOutcome] = (),
        state: DraftState | None = None,
    ) -> None:
        """Take news of a worker; those of a call that was replaced are ignored."""
        if self._present.get(attendant.worker_id) is not attendant:
            return
        attendant.last_seen_s = self._clock()
        if state is not None:
            attendant.state = state
        if slack is not None:
            attendant.slack = slack
            self.on_slack(attendant.worker_id, attendant.machine, slack)
        if outcomes:
            self.on_outcomes(attendant.worker_id, outcomes)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
