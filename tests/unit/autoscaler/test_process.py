"""Whole processes: a real Redis, a real Prometheus, a supervisor over gRPC, signals."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member, Role
from paceline.process.membership import Heartbeat, Membership
from paceline.process.metrics import Metrics
from paceline.rpc.server import create_server
from paceline.v1 import fleet_control_pb2_grpc
from tests.prometheus_server import PrometheusServer, needs_prometheus
from tests.redis_server import RedisServer, redis_server, redis_url
from tests.unit.autoscaler.autoscaler_process import START_TIMEOUT_S, AutoscalerProcess
from tests.unit.autoscaler.control import SERVICE_NAME, Control
from tests.unit.autoscaler.exporter import GatewayPage, WorkerPage
from tests.unit.autoscaler.made import gateway, worker
from tests.waiting import until

__all__ = ["redis_server", "redis_url"]

pytestmark = [needs_prometheus, pytest.mark.timeout(300)]

FLAGS = ("--period-s", "0.3", "--window-s", "4", "--stale-s", "3", "--policy", "static")


class Fleet:
    """Members that announce themselves from this process."""

    def __init__(self, redis_url: str) -> None:
        self.membership = Membership(redis_url, "test")
        self.members: dict[str, Member] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def join(self, member: Member) -> None:
        """Announce a member from now on, as `members` has it."""
        self.members[member.id] = member
        heartbeat = Heartbeat(self.membership, lambda: self.members[member.id])
        self._tasks.append(asyncio.create_task(heartbeat.run()))

    async def close(self) -> None:
        """Stop announcing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(UnavailableError):
            await self.membership.close()


@pytest.fixture
async def fleet(redis_url: str) -> AsyncIterator[Fleet]:
    fleet = Fleet(redis_url)
    fleet.join(gateway())
    fleet.join(worker("prefill-0", Role.PREFILL))
    fleet.join(worker("decode-0"))
    yield fleet
    await fleet.close()


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[PrometheusServer]:
    directory = tmp_path / "prometheus"
    directory.mkdir()
    server = PrometheusServer(directory)
    pages = [GatewayPage(), WorkerPage("prefill"), WorkerPage("decode")]
    server.scrape([page.target for page in pages])
    server.start()
    yield server
    server.kill()
    for page in pages:
        page.page.close()


@pytest.fixture
async def control() -> AsyncIterator[tuple[Control, str]]:
    control = Control({"prefill": 1, "decode": 1})

    def add(server: grpc.aio.Server) -> None:
        fleet_control_pb2_grpc.add_FleetControlServiceServicer_to_server(control, server)

    server = create_server(Metrics("test"), [SERVICE_NAME], [add], host="127.0.0.1", port=0)
    await server.start()
    yield control, server.address
    await server.drain(0)


@pytest.fixture
def scaler(
    redis_url: str, tmp_path: Path, prometheus: PrometheusServer, control: tuple[Control, str]
) -> Iterator[AutoscalerProcess]:
    flags = (*FLAGS, "--prometheus-url", prometheus.url, "--target", "local")
    flags += ("--control-address", control[1], "--decode-min", "3")
    process = AutoscalerProcess(redis_url, tmp_path, flags)
    yield process
    process.kill()


async def until_decided(scaler: AutoscalerProcess, kind: str) -> None:
    """Wait until the last decision is of a kind."""

    async def is_so() -> bool:
        decisions = await asyncio.to_thread(scaler.decisions)
        return bool(decisions) and decisions[-1]["kind"] == kind

    await until(is_so, START_TIMEOUT_S)


async def test_it_scales_explains_holds_and_leaves(
    scaler: AutoscalerProcess,
    fleet: Fleet,
    control: tuple[Control, str],
    prometheus: PrometheusServer,
    redis_server: RedisServer,
) -> None:
    scaler.start()
    await until(lambda: control[0].sizes["decode"] == 3, START_TIMEOUT_S)
    assert control[0].sizes["prefill"] == 1
    await until_decided(scaler, "steady")
    assert await asyncio.to_thread(scaler.get, "/readyz") == (200, "ready\n")
    assert await asyncio.to_thread(scaler.get, "/decisions?last=x") == (
        400,
        "last: a number of decisions\n",
    )
    metric = await asyncio.to_thread(scaler.metric, "autoscaler_desired_replicas", pool="decode")
    assert metric == 3.0
    age_s = await asyncio.to_thread(scaler.metric, "autoscaler_source_age_seconds")
    assert age_s is not None and age_s < 3.0
    (own,) = [m for m in await fleet.membership.members() if m.role is Role.AUTOSCALER]
    assert own.metrics_address == scaler.address
    assert scaler.address is not None
    lines = await explained("--autoscaler", scaler.address, "--last", "1000")
    (grown,) = [line for line in lines if "grow" in line]
    assert "decode 1 -> 3" in grown and "fixed: prefill 1, decode 3" in grown
    assert "[decode applied]" in grown

    # Prometheus goes, then Redis: it holds and says why, and goes on when they are back.
    prometheus.kill()
    await until_decided(scaler, "hold")
    assert scaler.decisions()[-1]["problems"][0].startswith("prometheus-unreachable: all queries")
    prometheus.start()
    await until_decided(scaler, "steady")
    redis_server.kill()
    await until_decided(scaler, "hold")
    redis_server.start()
    await until_decided(scaler, "steady")
    assert control[0].sizes == {"prefill": 1, "decode": 3}

    scaler.signal(signal.SIGTERM)
    assert await asyncio.to_thread(scaler.wait) == 0
    members = await fleet.membership.members()
    assert Role.AUTOSCALER not in {member.role for member in members}


async def test_only_one_acts_and_another_takes_over(
    scaler: AutoscalerProcess, fleet: Fleet, tmp_path: Path, redis_url: str
) -> None:
    scaler.start()
    await until(lambda: scaler.events("leading"), START_TIMEOUT_S)
    second = AutoscalerProcess(redis_url, tmp_path, scaler.flags, name="second")
    second.start()
    try:
        await until(lambda: second.events("standing-by"), START_TIMEOUT_S)
        assert await asyncio.to_thread(second.get, "/readyz") == (200, "ready\n")
        assert await asyncio.to_thread(second.decisions) == []
        # The first hangs until its lease ends; when it wakes up it is fenced and ends.
        scaler.signal(signal.SIGSTOP)
        await until(lambda: second.events("leading"), START_TIMEOUT_S)
        scaler.signal(signal.SIGCONT)
        assert await asyncio.to_thread(scaler.wait) == 1
        assert scaler.events("task-crashed")[0]["task"] == "heartbeat"
        await until_decided(second, "steady")
    finally:
        second.kill()


async def test_parked_requests_are_noticed_between_decisions(
    scaler: AutoscalerProcess, fleet: Fleet
) -> None:
    scaler.flags = (*scaler.flags, "--period-s", "3600")
    scaler.start()
    await until(lambda: len(scaler.decisions()) == 1, START_TIMEOUT_S)
    fleet.members["gateway-0"] = gateway(parked=2)
    await until(lambda: len(scaler.decisions()) == 2, START_TIMEOUT_S)
    assert scaler.decisions()[-1]["parked"] == 2


async def test_a_dry_run_changes_nothing_and_its_journal_can_be_replayed(
    redis_url: str, tmp_path: Path, fleet: Fleet, prometheus: PrometheusServer
) -> None:
    journal = tmp_path / "journal.jsonl"
    flags = (*FLAGS, "--prometheus-url", prometheus.url, "--journal", str(journal))
    scaler = AutoscalerProcess(redis_url, tmp_path, (*flags, "--decode-min", "4"))
    scaler.start()
    try:
        await until(lambda: scaler.events("would-scale"), START_TIMEOUT_S)
        (said,) = scaler.events("would-scale")
        assert (said["pool"], said["from"], said["to"]) == ("decode", 1, 4)
        fleet.members["decode-0"] = replace(fleet.members["decode-0"], is_draining=True)
        await until(lambda: len(scaler.events("would-scale")) == 2, START_TIMEOUT_S)
    finally:
        scaler.signal(signal.SIGTERM)
        assert await asyncio.to_thread(scaler.wait) == 0
    lines = await explained("--replay", str(journal), "--policy", "static", "--json")
    again = [json.loads(line) for line in lines]
    # Decided again by the settings of this process: one decode worker is enough.
    assert {entry["pools"]["decode"]["desired"] for entry in again} <= {0, 1}
    assert {entry["kind"] for entry in again} >= {"grow", "hold"}


async def test_a_taken_port_ends_it_with_a_reason(redis_url: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        scaler = AutoscalerProcess(redis_url, tmp_path, ("--metrics-port", str(port)))
        scaler.start()
        assert await asyncio.to_thread(scaler.wait) == 1
    assert "taken" in scaler.events("start-failed")[0]["error"]


async def explained(*flags: str) -> list[str]:
    """Return the lines of `paceline autoscaler explain`."""
    command = [sys.executable, "-m", "paceline.cli", "autoscaler", "explain", *flags]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
