"""Drafters beside the one that everybody may use, "model:NAME" each: how they come, and go.

What is offered under a name is judged on the held-out text of the domain of that name. The first
version of a name is compared with what that domain has, the draft that everybody may use; it
displaces nothing, so there is nothing to try it against: it becomes an arm of the engines'
controllers, which draft with it where it brings most. Later versions are compared with the one
before and go on trial like any other (trials.py). The conductor owns a Bank.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from paceline.domain.draft_records import DraftRecord, DraftStage
from paceline.domain.drafts import MODEL_DRAFTER, label_of
from paceline.domain.errors import NotFoundError, PacelineError, PreconditionError
from paceline.domain.learnings import SequenceOutcome
from paceline.process.metrics import Metrics
from paceline.trainer.desk import Desk, DraftStore
from paceline.trainer.gate import Verdict
from paceline.trainer.training import Training
from paceline.trainer.trials import FORCED, TrialRules, Trials, verdict_on

logger = logging.getLogger(__name__)

_FOLLOW_PERIOD_S = 0.5


class Bank:
    """The members of a bank, each with trials of its own."""

    def __init__(
        self,
        desk: Desk,
        training: Training | None,
        directory: Path,
        metrics: Metrics,
        rules: TrialRules | None = None,
    ) -> None:
        """Without training only forced offers come into use; `directory` is for candidates."""
        self._desk = desk
        self._training = training
        self._directory = directory
        self._metrics = metrics
        self._rules = rules or TrialRules()
        self._trials: dict[str, Trials] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Keep trials of every member until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    self._follow(await self.members(), tasks)
                except PacelineError as error:
                    fields = {"reason": error.reason, "error": error.message}
                    logger.warning("bank-not-followed", extra={"fields": fields})
                await asyncio.sleep(_FOLLOW_PERIOD_S)

    def note(self, outcomes: Sequence[SequenceOutcome]) -> None:
        """Take what versions brought."""
        for trials in self._trials.values():
            trials.note(outcomes)

    async def members(self) -> dict[str, DraftRecord]:
        """Return the version in use of each member."""

        def read(store: DraftStore) -> dict[str, DraftRecord]:
            records = (store.active(entry.drafter) for entry in store.plan())
            return {r.drafter: r for r in records if r and r.drafter != MODEL_DRAFTER}

        return await self._desk.read(read)

    async def offer(self, directory: Path, drafter: str, is_forced: bool) -> DraftRecord:
        """Take a checkpoint as a version of a member; forced ones skip the gate.

        Raises:
            PacelineError: the registry refuses it, the bank is full, or a version is on trial.
        """
        record = await self.add(directory, drafter)
        if is_forced:
            return await self.settle(record, FORCED)
        if self._training is None:
            return record
        files = await self._desk.read(lambda store: store.files(record.version))
        return await self.settle(record, await self.judge(files[0].parent, drafter))

    async def add(
        self,
        directory: Path,
        drafter: str,
        *,
        parent: str = "",
        num_samples: int = 0,
        num_tokens: int = 0,
        rank: int = 0,
    ) -> DraftRecord:
        """Take a checkpoint as a candidate; without a parent it counts as made from what is used.

        Raises:
            PacelineError: the registry refuses it, or the bank is full.
        """

        def add(store: DraftStore) -> DraftRecord:
            store.check_room(drafter)
            active = store.active(drafter) or store.active(MODEL_DRAFTER)
            return store.add(
                directory,
                drafter=drafter,
                parent=parent or ("" if active is None else active.version),
                num_samples=num_samples,
                num_tokens=num_tokens,
                rank=rank,
            )

        record = await self._desk.change(add)
        if record.stage is DraftStage.ACTIVE:
            raise PreconditionError(f"{record.version} is active", reason="draft-active")
        return record

    async def judge(self, candidate: Path, drafter: str) -> Verdict:
        """Compare a checkpoint with what a member's domain drafts with, on that domain's text.

        Raises:
            NotFoundError: nothing is active to compare it with.
            PacelineError: there is no answer.
        """

        def incumbent_of(store: DraftStore) -> str:
            active = store.active(drafter) or store.active(MODEL_DRAFTER)
            if active is None:
                raise NotFoundError("there is no draft to compare with", reason="draft-not-found")
            return str(store.files(active.version)[0].parent)

        assert self._training is not None
        incumbent, label = await self._desk.read(incumbent_of), label_of(drafter)
        learner = self._training.learner
        return verdict_on(await learner.judge(incumbent, str(candidate), label), self._rules)

    async def settle(self, record: DraftRecord, verdict: Verdict) -> DraftRecord:
        """Do what a verdict says: refuse, use as the first version, or put on trial.

        Raises:
            PacelineError: it may not go there, the bank is full, or a version is on trial.
        """

        def move(store: DraftStore) -> DraftRecord:
            stage = DraftStage.CANARY if store.active(record.drafter) else DraftStage.ACTIVE
            return store.decide(
                record.version,
                stage if verdict.is_accepted else DraftStage.REFUSED,
                verdict.reason,
                verdict.detail,
                verdict.scores,
            )

        decided = await self._desk.change(move)
        stage = decided.stage.value
        self._metrics.draft_decisions.labels(record.drafter, stage, verdict.reason).inc()
        fields = {"drafter": record.drafter, "version": record.version, "stage": stage}
        fields |= {"reason": verdict.reason, "detail": verdict.detail}
        logger.info("draft-decided", extra={"fields": fields})
        return decided

    def _follow(self, members: dict[str, DraftRecord], tasks: asyncio.TaskGroup) -> None:
        """Begin trials for new members, end those of removed ones."""
        for name in members.keys() - self._trials.keys():
            # What is learned for a member comes by way of specialising.py.
            trials = Trials(self._desk, None, self._directory, self._metrics, self._rules, name)
            self._trials[name] = trials
            self._running[name] = tasks.create_task(trials.run(), name=f"trials-{name}")
        for name in self._trials.keys() - members.keys():
            del self._trials[name]
            self._running.pop(name).cancel()
