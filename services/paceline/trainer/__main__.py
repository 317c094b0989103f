"""`python -m paceline.trainer`: the draft registry of one target, and who decides about drafts.

Without torch: what computes on tensors runs in processes of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from paceline import __version__
from paceline.domain.directories import state_directory
from paceline.domain.drafts import MODEL_DRAFTER, DraftEntry
from paceline.domain.errors import PacelineError, PreconditionError, UnavailableError
from paceline.domain.member import Member, Role
from paceline.engine.checkpoint_files import model_digest
from paceline.process.lifecycle import Tasks, exit_with_parent, stop_event
from paceline.process.logs import setup_logging
from paceline.process.machine import machine_name
from paceline.process.membership import Heartbeat, Membership
from paceline.process.metrics import Metrics, serve_metrics
from paceline.process.sample_stream import SampleStream
from paceline.rpc.server import create_server
from paceline.trainer.attendants import Attendants
from paceline.trainer.bank import Bank
from paceline.trainer.conductor import Conductor
from paceline.trainer.desk import Desk
from paceline.trainer.heads_file import HeadsFile
from paceline.trainer.idle_cores import IdleCores
from paceline.trainer.learner_options import (
    HEADS_BATCH_TOKENS,
    MODEL_BATCH_TOKENS,
    LearnerOptions,
)
from paceline.trainer.offers import Inbox
from paceline.trainer.registry import Registry
from paceline.trainer.server import SERVICE_NAME, DraftServicer
from paceline.trainer.settings import TrainerSettings
from paceline.trainer.spare import POLICIES, SpareRules
from paceline.trainer.specialising import Specialising
from paceline.trainer.specialists import SpecialistRules
from paceline.trainer.training import Spare, Training
from paceline.trainer.trials import TrialRules, Trials
from paceline.v1 import drafts_pb2_grpc

logger = logging.getLogger("paceline.trainer")

_MAX_DIRECTORIES = 16
"""Trainers of one target that one user may run with default settings."""

_MIB = 1 << 20


async def serve(settings: TrainerSettings) -> int:
    """Run the trainer until a signal; return the exit code.

    Raises:
        PacelineError: the target or the floor is no checkpoint, or the registry is in use.
        OSError: a port is taken.
    """
    stop = stop_event()
    async with AsyncExitStack() as stack:
        metrics = Metrics("trainer", model=settings.model.resolve().name)
        tasks = Tasks(stop)
        stack.push_async_callback(tasks.close)
        digest = await asyncio.to_thread(model_digest, settings.model)
        home = await asyncio.to_thread(open_home, settings, digest)
        attendants = Attendants(metrics)
        desk = Desk(home.registry, attendants, lambda store: plan_of(home.registry, settings))
        stack.push_async_callback(desk.close)
        floor = await desk.change(lambda store: store.import_floor(settings.floor))
        training = _training(settings, digest, home, metrics, stack)
        rules = TrialRules(steps=settings.candidate_steps)
        # Heads are no versions: workers that were started with the file draft with them.
        tried = training if settings.learn == MODEL_DRAFTER else None
        trials = Trials(desk, tried, home.directory / "candidates", metrics, rules)
        if training is not None and tried is None:
            heads = HeadsFile(training, _heads_directory(home), settings.candidate_steps)
            tasks.spawn(heads.run(), "heads-file")
        bank = Bank(desk, tried, home.directory / "candidates", metrics, rules)
        specialising = _specialising(settings, desk, tried, bank, home)
        conductor = Conductor(
            attendants, trials, bank, training, machine_name(), specialising=specialising
        )
        tasks.spawn(conductor.run(), "conductor", is_vital=True)

        servicer = DraftServicer(digest, desk, attendants, home.inbox, conductor.offer, metrics)

        def add(server: grpc.aio.Server) -> None:
            drafts_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server)

        server = create_server(
            metrics, [SERVICE_NAME], [add], host=settings.host, port=settings.port
        )
        exposed = serve_metrics(metrics, settings.host, settings.metrics_port)
        stack.callback(exposed.close)
        await server.start()
        on_call = metrics.redis_seconds.observe
        membership = Membership(settings.redis_url, settings.fleet, on_call=on_call)
        stack.push_async_callback(membership.close)
        member = _member(settings, server.port, exposed.port)
        presence = Presence(member, attendants)
        heartbeat = Heartbeat(membership, presence.current, on_state=metrics.redis_up.set)
        tasks.spawn(heartbeat.run(), "heartbeat", is_vital=True)
        server.set_ready(True)
        fields = {"member": member.id, "address": member.address, "floor": floor.version}
        logger.info("ready", extra={"fields": {**fields, "registry": str(home.directory)}})

        await stop.wait()
        logger.info("draining", extra={"fields": {"workers": len(attendants)}})
        has_crashed = tasks.has_vital_crash
        presence.is_draining = True
        attendants.close()
        await server.drain(0.0 if has_crashed else settings.drain_grace_s)
        await tasks.close()
        await _leave(membership, member)
    logger.info("stopped", extra={"fields": {"has_crashed": has_crashed}})
    return 1 if has_crashed else 0


def plan_of(registry: Registry, settings: TrainerSettings) -> tuple[DraftEntry, ...]:
    """Return what workers are to draft with."""
    return registry.plan(canary_share=settings.canary_share, control_share=settings.control_share)


def _training(
    settings: TrainerSettings, digest: str, home: Home, metrics: Metrics, stack: AsyncExitStack
) -> Training | None:
    if not settings.training:
        return None
    on_call = metrics.redis_seconds.observe
    stream = SampleStream(settings.redis_url, settings.fleet, digest, on_call=on_call)
    stack.push_async_callback(stream.close)
    cores = os.sched_getaffinity(0)
    spare = Spare(POLICIES[settings.spare](SpareRules()), len(cores), IdleCores(cores))
    is_model = settings.learn == MODEL_DRAFTER
    options = LearnerOptions(
        draft=str(settings.floor) if is_model else "",
        state=str(home.directory / ("learner" if is_model else f"learner-{settings.learn}")),
        drafter=settings.learn,
        target=str(settings.model),
        loss=settings.loss,
        positions=settings.positions,
        learning_rate=settings.learning_rate,
        batch_tokens=MODEL_BATCH_TOKENS if is_model else HEADS_BATCH_TOKENS,
    )

    def active_draft() -> str:
        if not is_model:
            heads = _heads_directory(home)
            return str(heads) if (heads / "config.json").is_file() else ""
        active = home.registry.active()
        if active is None:
            return str(settings.floor)
        return str(home.registry.files(active.version)[0].parent)

    return Training(
        options, stream, spare, metrics, get_draft=active_draft, log_level=settings.log_level
    )


def _heads_directory(home: Home) -> Path:
    return home.directory / "heads"


def _specialising(
    settings: TrainerSettings, desk: Desk, training: Training | None, bank: Bank, home: Home
) -> Specialising | None:
    if training is None or not settings.specialists:
        return None
    rules = SpecialistRules(
        max_specialists=settings.specialists,
        rank=settings.specialist_rank,
        num_steps=settings.specialist_steps,
    )
    return Specialising(desk, training, bank, home.directory / "candidates", rules)


@dataclass(frozen=True, slots=True)
class Home:
    """What a trainer keeps on the disk."""

    directory: Path
    registry: Registry
    inbox: Inbox


def open_home(settings: TrainerSettings, digest: str) -> Home:
    """Take the first directory that no other trainer has.

    Raises:
        PreconditionError: the named one, or every default one, is in use.
    """
    refusal: PreconditionError | None = None
    for directory in _directories(settings, digest):
        try:
            registry = Registry(
                directory,
                model_digest=digest,
                time_s=time.time,
                keep=settings.draft_keep,
                max_bytes=settings.draft_registry_mb * _MIB,
            )
        except PreconditionError as error:
            if error.reason != "registry-in-use":
                raise
            refusal = error
        else:
            inbox = Inbox(directory / "incoming", settings.offer_mb * _MIB)
            return Home(directory, registry, inbox)
    assert refusal is not None
    raise refusal


def _directories(settings: TrainerSettings, digest: str) -> Iterator[Path]:
    if settings.draft_registry is not None:
        yield settings.draft_registry
        return
    base = state_directory(os.environ) / "drafts" / digest[:32]
    yield base
    yield from (base.with_name(f"{base.name}-{i}") for i in range(2, _MAX_DIRECTORIES + 1))


class Presence:
    """The trainer's entry in the membership, as of now."""

    def __init__(self, member: Member, attendants: Attendants) -> None:
        self._member = member
        self._attendants = attendants
        self.is_draining = False

    def current(self) -> Member:
        """Return the member with the version that most sequences use."""
        plan = self._attendants.plan
        version = plan[0].active.version if plan else ""
        return replace(self._member, draft_version=version, is_draining=self.is_draining)


async def _leave(membership: Membership, member: Member) -> None:
    try:
        await membership.deregister(member)
    except UnavailableError as error:
        logger.warning("deregister-failed", extra={"fields": {"error": error.message}})


def _member(settings: TrainerSettings, port: int, metrics_port: int) -> Member:
    return Member(
        id=_member_id(settings),
        role=Role.TRAINER,
        address=f"{settings.advertise_host or settings.host}:{port}",
        pid=os.getpid(),
        version=__version__,
        metrics_address=f"{settings.host}:{metrics_port}",
    )


def _member_id(settings: TrainerSettings) -> str:
    return settings.member_id or f"trainer-{socket.gethostname()}-{os.getpid()}"


def main(argv: list[str] | None = None) -> int:
    """Load settings, run, return the exit code."""
    exit_with_parent()
    settings = TrainerSettings.load(argv)
    setup_logging(_member_id(settings), settings.log_level)
    logger.info("starting", extra={"fields": {"settings": settings.describe()}})
    try:
        return asyncio.run(serve(settings))
    except (PacelineError, OSError) as error:
        fields = {"reason": getattr(error, "reason", "os-error"), "error": str(error)}
        logger.error("start-failed", extra={"fields": fields})
        return 1


if __name__ == "__main__":
    sys.exit(main())
