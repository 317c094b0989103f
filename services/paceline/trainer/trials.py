"""Brings candidates into use: made by the learner, judged by the gate, tried, watched.

    learner -> candidate -> gate -> canary -> active, watched beside the one before
                              |        |         |
                           refused  rolled back  rolled back

Verdicts come from gate.py and canary.py, versions and stages are the registry's; this file only
asks the one and tells the other. One candidate of a drafter is under way at a time.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paceline.domain.draft_records import DraftRecord, DraftStage
from paceline.domain.drafts import MODEL_DRAFTER
from paceline.domain.errors import PacelineError, PreconditionError
from paceline.domain.learnings import SequenceOutcome
from paceline.process.metrics import Metrics, RecentVersions
from paceline.trainer.canary import (
    CanaryAction,
    CanaryRules,
    CanaryTrial,
    CanaryVerdict,
    LiveWatch,
    WatchRules,
)
from paceline.trainer.desk import Desk, DraftStore
from paceline.trainer.gate import (
    UNDECIDED,
    DomainScores,
    GateRules,
    NewScore,
    PairedScore,
    Verdict,
    judge,
)
from paceline.trainer.training import Training
from paceline.v1 import learner_pb2

logger = logging.getLogger(__name__)

FORCED = Verdict(True, "forced", ())
"""What an operator says who does not ask the gate."""

_LOOK_PERIOD_S = 0.5
_FAILURE_PAUSE_S = 10.0


@dataclass(frozen=True, slots=True)
class TrialRules:
    """When candidates are made, and by what they are judged."""

    steps: int = 24
    """Optimiser steps that a candidate has more than the one before it."""
    min_positions: int = 256
    """Held-out positions without which there is nothing to judge by."""
    max_pause_steps: int = 768
    """Most steps between candidates; the distance doubles with each that gained nothing."""
    gate: GateRules = field(default_factory=GateRules)
    canary: CanaryRules = field(default_factory=CanaryRules)
    watch: WatchRules = field(default_factory=WatchRules)


class Trials:
    """What is under way for one drafter."""

    def __init__(
        self,
        desk: Desk,
        training: Training | None,
        directory: Path,
        metrics: Metrics,
        rules: TrialRules | None = None,
        drafter: str = MODEL_DRAFTER,
    ) -> None:
        """Without training only what is offered is tried.

        `directory` is for checkpoints that are not judged yet.
        """
        self._desk = desk
        self._training = training
        self._directory = directory
        self._metrics = metrics
        self._recent = RecentVersions((metrics.draft_tried_tokens, metrics.draft_accepted_tokens))
        self._rules = rules or TrialRules()
        self._drafter = drafter
        self._trial: CanaryTrial | None = None
        self._watch: LiveWatch | None = None
        self._pair = ("", "")
        """Active version and the one beside it, as trial or watch compare them."""
        self._has_news = asyncio.Event()
        self._judged_steps = 0
        """Optimiser steps of the last candidate."""
        self._distance = self._rules.steps
        self._turn = asyncio.Lock()
        """Held while a version is judged or moved."""

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                await self._look()
            except PacelineError as error:
                fields = {"reason": error.reason, "error": error.message}
                logger.warning("trial-failed", extra={"fields": fields})
                await asyncio.sleep(_FAILURE_PAUSE_S)
            except OSError as error:
                logger.warning("trial-failed", extra={"fields": {"error": str(error)}})
                await asyncio.sleep(_FAILURE_PAUSE_S)
            try:
                async with asyncio.timeout(_LOOK_PERIOD_S):
                    await self._has_news.wait()
            except TimeoutError:
                pass
            self._has_news.clear()

    def note(self, outcomes: Sequence[SequenceOutcome]) -> None:
        """Take what versions brought."""
        for outcome in outcomes:
            if outcome.drafter != self._drafter:
                continue
            labels = (outcome.drafter, outcome.draft_version)
            metrics, domain = self._metrics, outcome.domain
            self._recent.note(*labels)
            metrics.draft_tried_tokens.labels(*labels).inc(outcome.num_tried)
            metrics.draft_accepted_tokens.labels(*labels).inc(outcome.num_accepted)
            metrics.draft_domain_tried_tokens.labels(domain).inc(outcome.num_tried)
            metrics.draft_domain_accepted_tokens.labels(domain).inc(outcome.num_accepted)
            if self._trial is not None:
                self._trial.note(outcome)
            if self._watch is not None:
                self._watch.note(outcome)
        if self._trial is not None or self._watch is not None:
            self._has_news.set()

    async def offer(self, directory: Path, is_forced: bool) -> DraftRecord:
        """Take a checkpoint as a candidate; forced ones skip the gate, not the trial.

        Raises:
            PacelineError: the registry refuses it, or a version is on trial.
        """
        async with self._turn:
            record = await self._add(directory, 0, 0)
            if is_forced:
                return await self._begin(record, FORCED)
            if self._training is None:
                return record
            active = await self._active()
            candidate = await self._directory_of(record.version)
            verdict = await self._judge(candidate, active)
            return await self._settle(record, verdict)

    # -- looking ----------------------------------------------------------------------------

    async def _look(self) -> None:
        async with self._turn:
            await self._follow()
            if self._trial is not None:
                await self._conclude(self._trial.verdict())
            elif self._watch is not None:
                await self._conclude(self._watch.verdict())
            if self._trial is None:
                await self._propose()

    async def _follow(self) -> None:
        """Compare what is live now: others than this file move versions, too."""

        def read(store: DraftStore) -> tuple[str, str, bool]:
            active, canary = store.active(self._drafter), store.canary(self._drafter)
            beside = canary.version if canary else store.control_of(self._drafter)
            return (active.version if active else "", beside, canary is not None)

        active, beside, is_trial = await self._desk.read(read)
        if (active, beside) == self._pair and is_trial == (self._trial is not None):
            return
        has_moved = bool(self._pair[0]) and active != self._pair[0]
        self._pair = (active, beside)
        self._trial = self._watch = None
        if is_trial:
            self._trial = CanaryTrial(self._rules.canary, candidate=beside, incumbent=active)
        elif active and beside:
            self._watch = LiveWatch(self._rules.watch, active=active, control=beside)
        if has_moved and self._training is not None:
            # An operator chose: what was learned since led away from that.
            await self._training.learner.reset(await self._directory_of(active))

    async def _conclude(self, verdict: CanaryVerdict) -> None:
        """Do what a trial or a watch says."""
        active, beside = self._pair
        if verdict.action is CanaryAction.CONTINUE:
            return
        version = beside if self._trial is not None else active
        stage = (
            DraftStage.ACTIVE if verdict.action is CanaryAction.PROMOTE else DraftStage.ROLLED_BACK
        )

        def move(store: DraftStore) -> str:
            store.decide(version, stage, verdict.reason, verdict.detail, verdict.scores)
            now = store.active(self._drafter)
            return now.version if now else ""

        now = await self._desk.change(move)
        self._count(stage.value, verdict.reason, version, verdict.detail)
        self._pair = (now, "")
        self._trial = self._watch = None
        if stage is DraftStage.ROLLED_BACK and self._training is not None:
            await self._training.learner.reset(await self._directory_of(now))

    # -- candidates -------------------------------------------------------------------------

    async def _propose(self) -> None:
        """Make a candidate of what was learned, if it is time."""
        if self._training is None:
            return
        learner = self._training.learner
        steps = learner.progress.num_steps
        # A learner that lost its state counts from the last one that was saved.
        self._judged_steps = min(self._judged_steps, steps)
        if steps - self._judged_steps < self._distance:
            return
        active = await self._active()
        if active is None or active.is_pinned:
            return
        target = self._directory / "candidate"
        await asyncio.to_thread(_clear, target)
        exported = await learner.export(str(target))
        self._judged_steps = steps
        try:
            verdict = await self._judge(str(target), active, is_own=True)
            if not verdict.is_final:
                logger.info("candidate-undecided", extra={"fields": {"detail": verdict.detail}})
                return
            record = await self._add(target, exported.num_samples, exported.num_tokens)
            await self._settle(record, verdict)
        finally:
            await asyncio.to_thread(shutil.rmtree, target, True)

    async def _judge(
        self, candidate: str, active: DraftRecord | None, *, is_own: bool = False
    ) -> Verdict:
        """Compare a candidate with the active version on samples that it never learned from."""
        if active is None or self._training is None:
            return Verdict(True, "first", ())
        incumbent = await self._directory_of(active.version)
        judged = await self._training.learner.judge(incumbent, candidate, is_own=is_own)
        new = [NewScore(s.domain, _paired(s)) for s in judged.new_samples] if is_own else None
        return verdict_on(judged, self._rules, new)

    async def _settle(self, record: DraftRecord, verdict: Verdict) -> DraftRecord:
        if verdict.is_accepted:
            self._distance = self._rules.steps
            return await self._begin(record, verdict)
        self._distance = min(2 * self._distance, self._rules.max_pause_steps)
        self._count("refused", verdict.reason, record.version, verdict.detail)
        return await self._decide(record, DraftStage.REFUSED, verdict)

    async def _begin(self, record: DraftRecord, verdict: Verdict) -> DraftRecord:
        """Put a version on trial.

        Raises:
            PreconditionError: another one is, or a version is pinned.
        """
        if record.stage is DraftStage.ACTIVE:
            raise PreconditionError(f"{record.version} is active", reason="draft-active")
        self._count("canary", verdict.reason, record.version, verdict.detail)
        return await self._decide(record, DraftStage.CANARY, verdict)

    async def _decide(
        self, record: DraftRecord, stage: DraftStage, verdict: Verdict
    ) -> DraftRecord:
        return await self._desk.change(
            lambda store: store.decide(
                record.version, stage, verdict.reason, verdict.detail, verdict.scores
            )
        )

    async def _add(self, directory: Path, num_samples: int, num_tokens: int) -> DraftRecord:
        def add(store: DraftStore) -> DraftRecord:
            active = store.active(self._drafter)
            return store.add(
                directory,
                drafter=self._drafter,
                parent="" if active is None else active.version,
                num_samples=num_samples,
                num_tokens=num_tokens,
            )

        return await self._desk.change(add)

    async def _active(self) -> DraftRecord | None:
        return await self._desk.read(lambda store: store.active(self._drafter))

    async def _directory_of(self, version: str) -> str:
        files = await self._desk.read(lambda store: store.files(version))
        return str(files[0].parent)

    def _count(self, stage: str, reason: str, version: str, detail: str) -> None:
        self._metrics.draft_decisions.labels(self._drafter, stage, reason).inc()
        fields = {"version": version, "stage": stage, "reason": reason, "detail": detail}
        logger.info("draft-decided", extra={"fields": fields})


def _clear(directory: Path) -> None:
    """Make room for a directory: what is there goes, what is around it comes."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)


def verdict_on(
    judged: learner_pb2.DraftsJudged, rules: TrialRules, new: Sequence[NewScore] | None = None
) -> Verdict:
    """Return what the gate says of a learner's scores; `new` as for `judge`."""
    scores = paired(judged.domains)
    num_positions = sum(s.num_positions for d in scores for s in d.scores)
    if new is None and num_positions < rules.min_positions:
        return Verdict(False, UNDECIDED, (), f"only {num_positions} positions are held out")
    return judge(scores, rules.gate, new)


def paired(domains: Sequence[learner_pb2.JudgedDomain]) -> list[DomainScores]:
    """Return scores of the learner as the gate takes them."""
    return [
        DomainScores(domain.domain, [_paired(s) for s in domain.samples if s.num_positions])
        for domain in domains
    ]


def _paired(sample: learner_pb2.JudgedSample) -> PairedScore:
    """Return what verification accepts: argmax where the request was greedy, else the overlap."""

    def accepted(draft: learner_pb2.JudgedScore) -> float:
        number = float(draft.num_agreed) if sample.temperature == 0.0 else draft.overlap
        return min(number, float(sample.num_positions))

    return PairedScore(sample.num_positions, accepted(sample.candidate), accepted(sample.incumbent))
