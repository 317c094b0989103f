"""The one way from the event loop to the registry: off the loop, one call at a time.

The registry works on files, so its calls block. What changes it is followed by the plan that
workers hear. The server and the conductor share one desk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from paceline.domain.draft_records import DraftRecord, DraftScore, DraftStage
from paceline.domain.drafts import MODEL_DRAFTER, DraftEntry
from paceline.domain.errors import UnavailableError
from paceline.trainer.attendants import Attendants

T = TypeVar("T")

CALL_TIMEOUT_S = 60.0
"""Deadline of one call: copying a large draft on a slow disk takes seconds."""


class DraftStore(Protocol):
    """What is asked of a registry. Its errors are PacelineErrors."""

    def import_floor(self, checkpoint: Path, drafter: str = MODEL_DRAFTER) -> DraftRecord:
        """Take the version that always stays; again and again is once."""
        ...

    def add(
        self,
        checkpoint: Path,
        *,
        drafter: str,
        parent: str,
        num_samples: int,
        num_tokens: int,
        rank: int = 0,
    ) -> DraftRecord:
        """Take a copy of a checkpoint as a candidate."""
        ...

    def decide(
        self,
        version: str,
        stage: DraftStage,
        reason: str,
        detail: str = "",
        scores: tuple[DraftScore, ...] = (),
    ) -> DraftRecord:
        """Put a version at a stage."""
        ...

    def rollback(self, drafter: str, version: str = "") -> DraftRecord:
        """Go back to a version, or to the one before the active one."""
        ...

    def pin(self, drafter: str, version: str) -> DraftRecord:
        """Make a version active until it is unpinned."""
        ...

    def unpin(self, drafter: str) -> DraftRecord:
        """Let the active version be exchanged again."""
        ...

    def remove(self, drafter: str) -> DraftRecord:
        """Give a member of the bank up."""
        ...

    def check_room(self, drafter: str) -> None:
        """Refuse a drafter that would be one too many."""
        ...

    def get(self, prefix: str) -> DraftRecord:
        """Return a version by a beginning that no other has."""
        ...

    def records(self, drafter: str = "") -> Sequence[DraftRecord]:
        """Return all versions, newest first."""
        ...

    def active(self, drafter: str) -> DraftRecord | None:
        """Return the version in use."""
        ...

    def canary(self, drafter: str) -> DraftRecord | None:
        """Return the version on trial."""
        ...

    def floor(self, drafter: str) -> DraftRecord | None:
        """Return the version that always stays."""
        ...

    def previous(self, drafter: str) -> DraftRecord | None:
        """Return the version that was in use before."""
        ...

    def control_of(self, drafter: str) -> str:
        """Return the version that the active one is compared with live; empty for none."""
        ...

    def files(self, version: str) -> list[Path]:
        """Return the files of a version."""
        ...

    def verify(self, version: str) -> None:
        """Check the bytes of a version against its digest."""
        ...

    def plan(self) -> tuple[DraftEntry, ...]:
        """Return what workers are to draft with."""
        ...


class Desk:
    """Reads and changes a registry from the event loop."""

    def __init__(
        self,
        store: DraftStore,
        attendants: Attendants,
        make_plan: Callable[[DraftStore], tuple[DraftEntry, ...]] = lambda store: store.plan(),
    ) -> None:
        """Publish to the attendants what `make_plan` says of the store."""
        self._store = store
        self._make_plan = make_plan
        self._attendants = attendants
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[object]] = set()

    async def read(self, call: Callable[[DraftStore], T]) -> T:
        """Return what a call says that changes nothing.

        Raises:
            UnavailableError: the registry does not answer in time.
            PacelineError: what the registry says.
        """
        return await self._run(lambda: asyncio.to_thread(call, self._store))

    async def change(self, call: Callable[[DraftStore], T]) -> T:
        """Make a change, publish the plan that follows, return what the call says.

        A change that has begun is made and published, also if the caller leaves.

        Raises:
            UnavailableError: the registry does not answer in time.
            PacelineError: what the registry says; nothing changed.
        """

        async def run() -> T:
            result, plan = await asyncio.to_thread(
                lambda: (call(self._store), self._make_plan(self._store))
            )
            self._attendants.publish(plan)
            return result

        return await self._run(run)

    async def close(self) -> None:
        """Wait for calls that run."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(self, make: Callable[[], Awaitable[T]]) -> T:
        """Run one call; a thread cannot be stopped, so it keeps its turn to its end."""

        async def turn() -> T:
            async with self._lock:
                return await make()

        task = asyncio.create_task(turn(), name="registry")
        self._running.add(task)
        task.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await asyncio.shield(task)
        except TimeoutError as error:
            raise UnavailableError("the registry is busy", reason="registry-busy") from error

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._running.discard(task)
        # Also if its caller left: an exception that nobody reads is reported as a bug.
        if not task.cancelled():
            task.exception()
