"""Joins an engine to the trainer: what the bridge says goes out, what the trainer wants comes in.

Every worker tells its slack, since whoever computes beside it must know; those that draft follow
plans as well.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence

from paceline.domain.directories import cache_directory
from paceline.domain.drafts import MODEL_DRAFTER, DraftState, HeldDraft, StagedDraft
from paceline.domain.errors import UnavailableError
from paceline.domain.member import Role
from paceline.process.lifecycle import Tasks
from paceline.process.machine import machine_name
from paceline.process.membership import Membership
from paceline.process.metrics import Metrics
from paceline.rpc.codec import step_cost_from_proto
from paceline.v1 import engine_pb2
from paceline.worker.attendance import Attendance, Identity, SlackMeter
from paceline.worker.bridge import EngineBridge
from paceline.worker.draft_files import DraftCache
from paceline.worker.drafts import DraftFollower
from paceline.worker.outbox import Outbox
from paceline.worker.settings import WorkerSettings

_MIB = 1 << 20


class TrainerLink:
    """One engine's way to the trainer."""

    def __init__(
        self,
        settings: WorkerSettings,
        worker_id: str,
        ready: engine_pb2.EngineReady,
        bridge: EngineBridge,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._bridge = bridge
        self._metrics = metrics
        self._identity = Identity(worker_id, ready.model_digest, machine_name())
        self._local = local_drafts(settings, ready)
        self._meter = SlackMeter(
            step_cost_from_proto(ready.step_cost),
            settings.threads,
            settings.chunk_tokens,
            settings.itl_target_s,
        )
        self.outbox = Outbox(time.monotonic, on_dropped=metrics.draft_outcomes_dropped.inc)
        """What the worker has to tell."""

    async def run(self, membership: Membership, tasks: Tasks) -> None:
        """Attend at the trainer, wherever it runs, until cancelled."""
        draw = random.Random()
        follower = self._follower(draw) if drafts_by_model(self._settings) else None
        finder = TrainerFinder(membership)
        attendance = Attendance(
            self._identity, finder, self.outbox, follower, self._metrics, random=draw
        )
        held = tuple(HeldDraft(each.drafter, each.version) for each in self._local)
        attendance.note_state(DraftState(held))
        self._bridge.on_draft_state = attendance.note_state
        self._bridge.on_load = self._note_load
        self._note_load()
        await attendance.run(tasks)

    def _note_load(self) -> None:
        bridge = self._bridge
        slack = self._meter.slack(bridge.load, bridge.num_unheard, bridge.last_step_s)
        self.outbox.put_slack(slack)

    def _follower(self, draw: random.Random) -> DraftFollower:
        directory = self._settings.draft_cache_dir or cache_directory(os.environ) / "drafts"
        cache = DraftCache(directory, self._settings.draft_cache_mb * _MIB)
        return DraftFollower(
            cache, self._bridge.change_drafts, self._metrics, local=self._local, random=draw
        )


class TrainerFinder:
    """Finds the trainers of the fleet."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    async def __call__(self) -> Sequence[str]:
        """Return host:port of each; none while Redis is away."""
        try:
            members = await self._membership.members()
        except UnavailableError:
            return ()
        return [m.address for m in members if m.role is Role.TRAINER and not m.is_draining]


def drafts_by_model(settings: WorkerSettings) -> bool:
    """Whether the worker's engine may have a drafting model at all."""
    options = settings.engine_options()
    return MODEL_DRAFTER in options.drafters and options.draft is not None


def local_drafts(
    settings: WorkerSettings, ready: engine_pb2.EngineReady
) -> tuple[StagedDraft, ...]:
    """Return what the engine began to draft with; its files are here."""
    directory = settings.engine_options().draft
    if not ready.draft_version or directory is None:
        return ()
    return (StagedDraft(MODEL_DRAFTER, ready.draft_version, directory, 1.0),)
