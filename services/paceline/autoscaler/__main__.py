"""`python -m paceline.autoscaler`: sizes the pools of a fleet."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from paceline import __version__
from paceline.autoscaler.http import create_app
from paceline.autoscaler.journal import Journal, JournalFile
from paceline.autoscaler.leader import stand_by
from paceline.autoscaler.loop import LoopTimes, ScalingLoop
from paceline.autoscaler.ownership import Ownership
from paceline.autoscaler.policies import create_policy
from paceline.autoscaler.report import Report
from paceline.autoscaler.settings import AutoscalerSettings
from paceline.autoscaler.sources.fleet import FleetSource
from paceline.autoscaler.sources.live import LiveSource
from paceline.autoscaler.sources.prometheus import PrometheusRules, PrometheusSource
from paceline.autoscaler.sources.prometheus_api import PrometheusApi
from paceline.autoscaler.steering import Steering
from paceline.autoscaler.targets import create_target
from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member, Role
from paceline.process.http_server import HttpServer
from paceline.process.lifecycle import Tasks, exit_with_parent, stop_event
from paceline.process.logs import setup_logging
from paceline.process.membership import Heartbeat, Membership
from paceline.process.metrics import Metrics

logger = logging.getLogger("paceline.autoscaler")

_CALLS_PER_CHANGE = 3
"""A change may take some calls in a row, each under the target's deadline."""


async def serve(settings: AutoscalerSettings) -> int:
    """Run until a signal; return the exit code.

    Raises:
        OSError: the port is taken.
        ValueError: a setting is of no use.
    """
    stop = stop_event()
    async with AsyncExitStack() as stack:
        metrics = Metrics("autoscaler")
        metrics.watch_loop(asyncio.get_running_loop())
        tasks = Tasks(stop)
        membership = Membership(settings.redis_url, settings.fleet)
        stack.push_async_callback(membership.close)
        report = Report(metrics)
        journal = _journal(settings)
        stack.callback(journal.close)
        leadership = Leadership()
        described = {name: str(getattr(settings, name)) for name in ("fleet", "policy", "target")}
        app = create_app(journal, metrics, described, leadership.why_not_ready)
        http = HttpServer(app, settings.host, settings.metrics_port)
        serving = tasks.spawn(http.run(), "http", is_vital=True)
        stack.push_async_callback(tasks.close)
        member = _member(settings, http.port)
        heartbeat = Heartbeat(membership, lambda: member, on_state=metrics.redis_up.set)
        loop = _loop(settings, membership, heartbeat, report, journal, stack)
        logger.info("listening", extra={"fields": {"http": http.port, "member": member.id}})

        async def lead() -> None:
            await stand_by(membership, member.id)
            leadership.loop = loop
            logger.info("leading", extra={"fields": {"policy": settings.policy}})
            tasks.spawn(heartbeat.run(), "heartbeat", is_vital=True)
            tasks.spawn(loop.run(), "scaling", is_vital=True)

        tasks.spawn(lead(), "lead", is_vital=True)
        await stop.wait()
        has_crashed = tasks.has_vital_crash
        await http.close(serving)
        await tasks.close()
        await _leave(membership, member, heartbeat)
    logger.info("stopped", extra={"fields": {"has_crashed": has_crashed}})
    return 1 if has_crashed else 0


@dataclass
class Leadership:
    """Whether this process decides, or waits for its turn."""

    loop: ScalingLoop | None = None

    def why_not_ready(self) -> str:
        """Return why it is not ready, empty if it is; waiting for one's turn is ready."""
        is_stuck = self.loop is not None and self.loop.is_stuck
        return "no decision is made" if is_stuck else ""


def _loop(
    settings: AutoscalerSettings,
    membership: Membership,
    heartbeat: Heartbeat,
    report: Report,
    journal: Journal,
    stack: AsyncExitStack,
) -> ScalingLoop:
    """Put source, policy and target together; the stack closes what they hold."""
    fleet = FleetSource(membership, settings.member_id, lambda: heartbeat.epoch)
    target = create_target(settings, fleet.counts)
    stack.push_async_callback(target.close)
    # A dry run's sizes are what is there, and change without anybody's asking.
    rule = "ignore" if settings.target == "dry-run" else settings.foreign_changes
    steering = Steering(
        target,
        Ownership(rule, settings.foreign_hold_s),
        random.Random(),
        settings.target_timeout_s * _CALLS_PER_CHANGE,
        report.note_target_failure,
    )
    source = LiveSource(
        _prometheus(settings, stack),
        fleet,
        steering.read,
        report.note_age,
        scrape_grace_s=settings.window_s + settings.stale_s,
    )
    times = LoopTimes(settings.period_s)
    policy, clock = create_policy(settings.policy, settings.rules()), steady_clock()
    return ScalingLoop(source, policy, steering, journal, report, clock, fleet.num_parked, times)


def _prometheus(settings: AutoscalerSettings, stack: AsyncExitStack) -> PrometheusSource:
    api = PrometheusApi(
        settings.prometheus_url,
        settings.query_timeout_s,
        token_file=settings.prometheus_token_file,
        ca_file=settings.prometheus_ca_file,
    )
    stack.push_async_callback(api.close)
    rules = PrometheusRules(
        window_s=settings.window_s,
        stale_s=settings.stale_s,
        ttft_s=settings.slo_ttft_s,
        itl_s=settings.slo_itl_s,
        selector=settings.prometheus_selector,
    )
    return PrometheusSource(api, rules)


def steady_clock() -> Callable[[], float]:
    """Return a clock that shows the time of day as of now and never goes back."""
    offset_s = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset_s


def _journal(settings: AutoscalerSettings) -> Journal:
    file = None
    if settings.journal is not None:
        file = JournalFile(settings.journal, settings.journal_mb << 20)
    return Journal(settings.decisions_kept, file)


def _member(settings: AutoscalerSettings, http_port: int) -> Member:
    return Member(
        id=settings.member_id,
        role=Role.AUTOSCALER,
        address="",
        pid=os.getpid(),
        version=__version__,
        metrics_address=f"{settings.advertise_host or settings.host}:{http_port}",
    )


async def _leave(membership: Membership, member: Member, heartbeat: Heartbeat) -> None:
    """Let go of the record, so that another one takes over at once."""
    if heartbeat.epoch is None:
        return
    try:
        await membership.deregister(replace(member, epoch=heartbeat.epoch))
    except UnavailableError as error:
        logger.warning("deregister-failed", extra={"fields": {"error": error.message}})


def main(argv: list[str] | None = None) -> int:
    """Load settings, run, return the exit code."""
    exit_with_parent()
    settings = AutoscalerSettings.load(argv)
    setup_logging(settings.member_id, settings.log_level)
    logger.info("starting", extra={"fields": {"settings": settings.describe()}})
    try:
        return asyncio.run(serve(settings))
    except (OSError, ValueError) as error:
        logger.error("start-failed", extra={"fields": {"error": str(error)}})
        return 1


if __name__ == "__main__":
    sys.exit(main())
