"""Joins the two sides of the trainer: what workers say, and what is drafted with.

Attendants tell what drafts brought and what could be spared; training.py learns within that,
trials.py brings what was learned into use, bank.py what is offered under a name.
trainer/__main__.py makes one and runs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from paceline.domain.draft_records import DraftRecord
from paceline.domain.drafts import MODEL_DRAFTER
from paceline.domain.learnings import SequenceOutcome
from paceline.domain.slack import Slack
from paceline.trainer.attendants import Attendants
from paceline.trainer.bank import Bank
from paceline.trainer.specialising import Specialising
from paceline.trainer.training import Training
from paceline.trainer.trials import Trials

logger = logging.getLogger(__name__)


class Conductor:
    """Listens to the attendants, runs training and trials."""

    def __init__(
        self,
        attendants: Attendants,
        trials: Trials,
        bank: Bank,
        training: Training | None,
        machine: str,
        specialising: Specialising | None = None,
    ) -> None:
        """Without training only offers come into use; `machine` is this process's."""
        self._trials = trials
        self._bank = bank
        self._specialising = specialising
        self._training = training
        self._machine = machine
        attendants.on_outcomes = self.on_outcomes
        attendants.on_slack = self.on_slack
        attendants.on_leave = self.on_leave

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._trials.run(), name="trials")
            tasks.create_task(self._bank.run(), name="bank")
            if self._specialising is not None:
                tasks.create_task(self._specialising.run(), name="specialising")
            if self._training is not None:
                tasks.create_task(self._training.run(), name="training")

    async def offer(self, directory: Path, drafter: str, is_forced: bool) -> DraftRecord:
        """Take a checkpoint as a candidate; forced ones go on trial at once.

        Raises:
            PacelineError: the registry refuses it, or another version is on trial.
        """
        if drafter == MODEL_DRAFTER:
            record = await self._trials.offer(directory, is_forced)
        else:
            record = await self._bank.offer(directory, drafter, is_forced)
        fields = {
            "drafter": drafter,
            "version": record.version,
            "stage": record.stage.value,
            "is_forced": is_forced,
        }
        logger.info("draft-offered", extra={"fields": fields})
        return record

    # -- what workers say -------------------------------------------------------------------

    def on_outcomes(self, worker_id: str, outcomes: Sequence[SequenceOutcome]) -> None:
        """Take what drafts brought."""
        del worker_id
        self._trials.note(outcomes)
        self._bank.note(outcomes)
        if self._specialising is not None:
            self._specialising.note(outcomes)

    def on_slack(self, worker_id: str, machine: str, slack: Slack) -> None:
        """Take what a worker could spare; those of other machines compute elsewhere."""
        if self._training is not None and machine == self._machine:
            self._training.note_slack(worker_id, slack)

    def on_leave(self, worker_id: str) -> None:
        """Forget a worker."""
        if self._training is not None:
            self._training.note_slack(worker_id, None)
