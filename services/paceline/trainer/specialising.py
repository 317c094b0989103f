"""Makes drafts for single domains: asks what is worth it, lets one be trained, brings it in.

specialists.py chooses, the learner's process trains (specialist.py), bank.py judges and brings into
use. One is made at a time. The conductor runs it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from paceline.domain.draft_records import DraftRecord
from paceline.domain.drafts import MAX_DRAFTERS, MODEL_DRAFTER, label_of, member_name
from paceline.domain.errors import InternalError, PacelineError
from paceline.domain.learnings import SequenceOutcome
from paceline.trainer.bank import Bank
from paceline.trainer.desk import Desk, DraftStore
from paceline.trainer.specialists import Choice, Ledger, SpecialistRules, choose
from paceline.trainer.training import Training

logger = logging.getLogger(__name__)

_LOOK_PERIOD_S = 5.0
_FAILURE_PAUSE_S = 30.0


class Specialising:
    """What is under way, and what was asked for before."""

    def __init__(
        self, desk: Desk, training: Training, bank: Bank, directory: Path, rules: SpecialistRules
    ) -> None:
        """`directory` is for a checkpoint that is not judged yet."""
        self._desk = desk
        self._training = training
        self._bank = bank
        self._target = directory / "specialist"
        self._rules = rules
        self._ledger = Ledger()
        self._asked: dict[str, int] = {}
        """Samples of a domain when it was last asked for; of one asked for by an earlier process
        only the record is left."""

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_PERIOD_S)
            try:
                await self.look()
            except (PacelineError, OSError) as error:
                fields = {"reason": getattr(error, "reason", "os-error"), "error": str(error)}
                logger.warning("specialist-failed", extra={"fields": fields})
                await asyncio.sleep(_FAILURE_PAUSE_S)

    def note(self, outcomes: Sequence[SequenceOutcome]) -> None:
        """Take what drafts brought."""
        self._ledger.note(outcomes)

    async def look(self) -> None:
        """Do what is worth it now, to its end.

        Raises:
            PacelineError, OSError: it could not be done.
        """
        general = await self._desk.read(lambda store: store.active(MODEL_DRAFTER))
        if general is None:
            return
        members = await self._bank.members()
        choice = await self._choose(members)
        for domain in choice.drop:
            await self._drop(member_name(domain))
        is_there = member_name(choice.make) in members
        has_room = len(members) - len(choice.drop) < MAX_DRAFTERS - 1
        if choice.make and (is_there or has_room):
            await self._make(choice.make, general)

    async def _choose(self, members: dict[str, DraftRecord]) -> Choice:
        def busy(store: DraftStore) -> set[str]:
            return {
                label_of(name)
                for name, active in members.items()
                if not active.rank or active.is_pinned or store.canary(name) is not None
            }

        others = await self._desk.read(busy)
        specialists = {label_of(name) for name, active in members.items() if active.rank}
        samples = dict(self._training.learner.progress.samples_by_domain)
        made = {label_of(name): active.num_samples for name, active in members.items()}
        views = self._ledger.views(samples, made | self._asked, specialists, others)
        return choose(views, self._rules)

    async def _drop(self, drafter: str) -> None:
        await self._desk.change(lambda store: store.remove(drafter))
        logger.info("specialist-dropped", extra={"fields": {"drafter": drafter}})

    async def _make(self, domain: str, general: DraftRecord) -> None:
        learner, rules, drafter = self._training.learner, self._rules, member_name(domain)
        num_samples = learner.progress.samples_by_domain.get(domain, 0)
        logger.info("specialist-begun", extra={"fields": {"drafter": drafter}})
        base = await self._desk.read(lambda store: store.files(general.version)[0].parent)
        await asyncio.to_thread(shutil.rmtree, self._target, True)
        await asyncio.to_thread(self._target.parent.mkdir, parents=True, exist_ok=True)
        try:
            exported = await learner.specialise(
                str(base), domain, str(self._target), rank=rules.rank, num_steps=rules.num_steps
            )
            self._asked[domain] = num_samples
            verdict = await self._bank.judge(self._target, drafter)
            if not verdict.is_final:
                fields = {"drafter": drafter, "detail": verdict.detail}
                logger.info("specialist-undecided", extra={"fields": fields})
                return
            record = await self._bank.add(
                self._target,
                drafter,
                parent=general.version,
                num_samples=exported.num_samples,
                num_tokens=exported.num_tokens,
                rank=rules.rank,
            )
            await self._bank.settle(record, verdict)
        except InternalError:
            # It would go wrong again. A learner that died may do better.
            self._asked[domain] = num_samples
            raise
        finally:
            await asyncio.to_thread(shutil.rmtree, self._target, True)
