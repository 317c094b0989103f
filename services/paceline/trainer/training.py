"""Keeps one learner running, fed from the samples' stream, and within what is spare.

The learner is a process that may be killed at any moment: a new one goes on from the state that
was saved last. What workers could spare comes as events (`note_slack`), and a grant is taken back
in the same turn of the loop. trials.py uses the learner to make and to judge candidates.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from paceline.domain.drafts import MEDUSA_DRAFTER
from paceline.domain.errors import ExhaustedError, PacelineError, UnavailableError
from paceline.domain.slack import Slack
from paceline.process.lifecycle import Tasks
from paceline.process.metrics import Metrics
from paceline.process.sample_stream import SampleStream
from paceline.trainer.idle_cores import IdleCores
from paceline.trainer.learner_link import LearnerLink
from paceline.trainer.learner_options import LearnerOptions
from paceline.trainer.processor_time import processor_time_s
from paceline.trainer.spare import Grant, Moment, SpareCapacity
from paceline.trainer.spare_ledger import SpareLedger
from paceline.v1 import learner_pb2

logger = logging.getLogger(__name__)

_FEED_PERIOD_S = 0.25
_FEED_COUNT = 64
_FEED_COUNT_HIDDEN = 16
"""Of samples with hidden states; with 16,384 of them a sample has 2 MiB, a frame 64 at most."""
"""Samples handed over at a time."""
_GOVERN_PERIOD_S = 0.1
"""Between two looks without an event; half of a grant."""
_SETTLING_PERIOD_S = 0.01
_SAVE_PERIOD_S = 60.0
_MAX_BACKOFF_S = 30.0
_START = "0"
"""Stream position in front of everything."""


@dataclass(slots=True)
class Spare:
    """Who may train now, and what came of it."""

    policy: SpareCapacity
    num_cores: int
    idle_cores: IdleCores
    workers: dict[str, Slack] = field(default_factory=dict)
    """Of this machine."""
    ledger: SpareLedger = field(default_factory=SpareLedger)
    granted: Grant = field(default_factory=lambda: Grant(0, 0.0, "none"))
    used: tuple[float, float] | None = None
    """Time and the learner's processor time when idle cores were last read."""

    def decide(self, now_s: float, learner_s: float | None) -> Grant:
        """Return what training may use from now on; `learner_s` is its processor time so far."""
        idle_cores = self.idle_cores.read()
        moment = Moment(
            now_s=now_s,
            workers=dict(self.workers),
            num_cores=self.num_cores,
            idle_cores=idle_cores,
            training_threads=self.granted.threads,
            training_cores=None if idle_cores is None else self._cores_used(now_s, learner_s),
        )
        grant = self.policy.grant(moment)
        self.ledger.note(moment, grant)
        self.granted = grant
        return grant

    def _cores_used(self, now_s: float, learner_s: float | None) -> float | None:
        before, self.used = self.used, None if learner_s is None else (now_s, learner_s)
        if before is None or learner_s is None or now_s <= before[0] or learner_s < before[1]:
            return None
        return (learner_s - before[1]) / (now_s - before[0])


class Training:
    """One learner and its owner."""

    def __init__(
        self,
        options: LearnerOptions,
        stream: SampleStream,
        spare: Spare,
        metrics: Metrics,
        *,
        get_draft: Callable[[], str],
        log_level: str = "INFO",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Train a draft.

        Args:
            options: of the learner; its draft is that of `get_draft`.
            stream: where samples come from.
            spare: what it may use.
            metrics: of the process.
            get_draft: directory of the checkpoint that a learner without a state starts from.
            log_level: of the learner process.
            monotonic: a clock, in seconds.
        """
        self._options = options
        self._stream = stream
        self._spare = spare
        self._metrics = metrics
        self._get_draft = get_draft
        self._log_level = log_level
        self._monotonic = monotonic
        self._learner: LearnerLink | None = None
        self._pid: int | None = None
        self._pausing: asyncio.Task[None] | None = None
        self._noted = learner_pb2.LearnerProgress()
        self._noted_spare = (0.0, 0.0, 0)
        """What metrics know."""

    @property
    def learner(self) -> LearnerLink:
        """The learner.

        Raises:
            UnavailableError: none runs now.
        """
        if self._learner is None:
            raise UnavailableError("no learner runs", reason="learner-died")
        return self._learner

    async def run(self) -> None:
        """Keep a learner running until cancelled."""
        pause_s = 1.0
        while True:
            begun_s = self._monotonic()
            try:
                await self._life()
            except UnavailableError as error:
                fields = {"reason": error.reason, "error": error.message}
                logger.warning("learner-lost", extra={"fields": fields})
            has_lived = self._monotonic() - begun_s > _MAX_BACKOFF_S
            pause_s = 1.0 if has_lived else min(2 * pause_s, _MAX_BACKOFF_S)
            await asyncio.sleep(pause_s)

    def note_slack(self, worker_id: str, slack: Slack | None) -> None:
        """Take what a worker of this machine could spare; None if it is gone."""
        if slack is None:
            self._spare.workers.pop(worker_id, None)
        else:
            self._spare.workers[worker_id] = slack
        self._govern()

    # -- one learner ------------------------------------------------------------------------

    async def _life(self) -> None:
        """Run one learner to its end.

        Raises:
            UnavailableError: it ended.
        """
        link = LearnerLink()
        link.on_progress = self._note_progress
        tasks = Tasks()
        try:
            options = replace(self._options, draft=self._get_draft())
            ready = await link.start(options, log_level=self._log_level)
            # Counters of the process begin anew; what its predecessor counted stays counted.
            self._noted = ready.progress
            self._learner, self._pid = link, ready.pid
            fields = {"pid": ready.pid, "position": ready.stream_id}
            logger.info("learner-ready", extra={"fields": fields})
            tasks.spawn(self._feed(link, ready.stream_id or _START), "learner-feed")
            tasks.spawn(self._renew(), "learner-grants")
            tasks.spawn(self._save(link), "learner-state")
            await link.run()
        finally:
            self._learner = self._pid = None
            await tasks.close()
            await link.close()

    async def _feed(self, link: LearnerLink, position: str) -> None:
        has_hidden = self._options.drafter == MEDUSA_DRAFTER
        count = _FEED_COUNT_HIDDEN if has_hidden else _FEED_COUNT
        while True:
            try:
                found = await self._stream.read(position, count)
                if found:
                    link.feed(found)
                    position = found[-1][0]
            except ExhaustedError:
                found = []
            except UnavailableError as error:
                if error.reason == "learner-died":
                    return
                # Redis is away: serving goes on, and so does learning from what is here.
                found = []
            if len(found) < count:
                await asyncio.sleep(_FEED_PERIOD_S)

    async def _renew(self) -> None:
        while True:
            self._govern()
            is_settling = self._spare.granted.reason == "settling"
            await asyncio.sleep(_SETTLING_PERIOD_S if is_settling else _GOVERN_PERIOD_S)

    async def _save(self, link: LearnerLink) -> None:
        while True:
            await asyncio.sleep(_SAVE_PERIOD_S)
            try:
                await link.save()
            except PacelineError as error:
                self._metrics.trainer_save_failures.inc()
                fields = {"reason": error.reason, "error": error.message}
                logger.warning("learner-not-saved", extra={"fields": fields})

    # -- spare capacity ---------------------------------------------------------------------

    def _govern(self) -> None:
        """Grant or take back, by what is known now."""
        before = self._spare.granted
        grant = self._spare.decide(self._monotonic(), self._learner_s())
        self._note_spare()
        link = self._learner
        if link is None:
            return
        try:
            if grant.threads:
                link.grant(grant.threads, grant.seconds)
            elif before.threads:
                self._pausing = asyncio.create_task(self._pause(link), name="learner-pause")
        except UnavailableError:
            return

    async def _pause(self, link: LearnerLink) -> None:
        begun_s = self._learner_s()
        try:
            await link.pause()
        except PacelineError:
            # Its grant ends by itself.
            return
        ended_s = self._learner_s()
        # By the clock it may take longer, while serving has the cores: that is no loss.
        if begun_s is not None and ended_s is not None:
            self._metrics.trainer_yield_seconds.observe(ended_s - begun_s)

    def _learner_s(self) -> float | None:
        return None if self._pid is None else processor_time_s(self._pid)

    # -- figures ----------------------------------------------------------------------------

    def _note_spare(self) -> None:
        ledger, metrics = self._spare.ledger, self._metrics
        metrics.trainer_granted_threads.set(self._spare.granted.threads)
        now = (ledger.offered_s, ledger.used_s, ledger.num_yields)
        counters = (
            metrics.trainer_spare_offered_core_seconds,
            metrics.trainer_spare_granted_core_seconds,
            metrics.trainer_yields,
        )
        for counter, total, noted in zip(counters, now, self._noted_spare, strict=True):
            counter.inc(max(0.0, total - noted))
        self._noted_spare = now

    def _note_progress(self, progress: learner_pb2.LearnerProgress) -> None:
        metrics, last = self._metrics, self._noted
        for counter, name in (
            (metrics.trainer_samples, "num_samples"),
            (metrics.trainer_corrupt_samples, "num_corrupt"),
            (metrics.trainer_micro_steps, "num_micro_steps"),
            (metrics.trainer_steps, "num_steps"),
            (metrics.trainer_tokens, "num_tokens"),
            (metrics.trainer_trained_seconds, "trained_s"),
            (metrics.trainer_skipped_batches, "num_skipped"),
            (metrics.trainer_restored_weights, "num_restored"),
        ):
            counter.inc(max(0.0, getattr(progress, name) - getattr(last, name)))
        metrics.trainer_loss.set(progress.loss)
        metrics.trainer_micro_step_seconds.set(progress.last_micro_step_s)
        metrics.trainer_replay_bytes.set(progress.replay_bytes)
        self._noted = progress
