"""Decides what is drafted with: here, what operators say, and the floor.

Between the two sides of the trainer: attendants tell what drafts bring and what could be spared,
the desk keeps versions and publishes plans. trainer/__main__.py makes one and runs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from paceline.domain.draft_records import DraftRecord, DraftStage
from paceline.domain.learnings import SequenceOutcome
from paceline.domain.slack import Slack
from paceline.trainer.attendants import Attendants
from paceline.trainer.desk import Desk, DraftStore

logger = logging.getLogger(__name__)


class Conductor:
    """Brings the floor, takes offers."""

    def __init__(self, desk: Desk, attendants: Attendants) -> None:
        """Listen to the attendants and act through the desk."""
        self._desk = desk
        attendants.on_outcomes = self.on_outcomes
        attendants.on_slack = self.on_slack
        attendants.on_leave = self.on_leave

    async def start(self, floor: Path) -> DraftRecord:
        """Take the floor's checkpoint and publish the first plan.

        Raises:
            PacelineError: the registry refuses it.
        """
        return await self._desk.change(lambda store: store.import_floor(floor))

    async def run(self) -> None:
        """Work until cancelled."""
        await asyncio.Event().wait()

    async def offer(self, directory: Path, drafter: str, is_forced: bool) -> DraftRecord:
        """Take a checkpoint: forced ones at once, others as candidates.

        Raises:
            PacelineError: the registry refuses it.
        """

        def take(store: DraftStore) -> DraftRecord:
            active = store.active(drafter)
            parent = "" if active is None else active.version
            record = store.add(
                directory, drafter=drafter, parent=parent, num_samples=0, num_tokens=0
            )
            if is_forced:
                store.decide(record.version, DraftStage.ACTIVE, "forced")
            return store.get(record.version)

        record = await self._desk.change(take)
        fields = {"version": record.version, "stage": record.stage.value, "is_forced": is_forced}
        logger.info("draft-offered", extra={"fields": fields})
        return record

    # -- what workers say -------------------------------------------------------------------

    def on_outcomes(self, worker_id: str, outcomes: Sequence[SequenceOutcome]) -> None:
        """Take what drafts brought."""

    def on_slack(self, worker_id: str, machine: str, slack: Slack) -> None:
        """Take what a worker could spare."""

    def on_leave(self, worker_id: str) -> None:
        """Forget a worker."""
