"""A trainer's door on one loop, over a real registry, and workers that attend at it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from paceline.domain.drafts import DraftEntry
from paceline.process.metrics import Metrics
from paceline.rpc.channel import open_channel
from paceline.rpc.draft_codec import entry_from_proto
from paceline.rpc.server import create_server
from paceline.trainer.attendants import Attendants
from paceline.trainer.bank import Bank
from paceline.trainer.conductor import Conductor
from paceline.trainer.desk import Desk
from paceline.trainer.offers import Inbox
from paceline.trainer.registry import Registry
from paceline.trainer.server import SERVICE_NAME, DraftServicer
from paceline.trainer.trials import Trials
from paceline.v1 import drafts_pb2, drafts_pb2_grpc
from tests.unit.trainer.small_drafts import make_draft

DIGEST = "ab" * 32
OFFER_BYTES = 64_000


@dataclass
class Rig:
    """One trainer's door."""

    address: str
    metrics: Metrics
    registry: Registry
    attendants: Attendants
    desk: Desk
    conductor: Conductor
    incoming: Path
    stub: Any

    def value(self, name: str, **labels: str) -> float:
        """Return a metric."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def trainer_rig(
    directory: Path, port: int = 0, digest: str = DIGEST, floor: Path | None = None
) -> AsyncIterator[Rig]:
    """Serve a registry in `directory`, by default with a small floor made there."""
    metrics = Metrics("trainer")
    floor = floor or directory / "floor"
    if not floor.exists():
        make_draft(floor, seed=0)
    registry = Registry(directory / "registry", model_digest=digest, time_s=time.time)
    attendants = Attendants(metrics)
    desk = Desk(registry, attendants)
    trials = Trials(desk, None, directory / "registry" / "candidates", metrics)
    bank = Bank(desk, None, directory / "registry" / "candidates", metrics)
    conductor = Conductor(attendants, trials, bank, None, "here")
    await desk.change(lambda store: store.import_floor(floor))
    incoming = directory / "registry" / "incoming"
    inbox = Inbox(incoming, OFFER_BYTES)
    servicer = DraftServicer(digest, desk, attendants, inbox, conductor.offer, metrics)

    def add(server: grpc.aio.Server) -> None:
        drafts_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server)

    server = create_server(metrics, [SERVICE_NAME], [add], host="127.0.0.1", port=port)
    await server.start()
    server.set_ready(True)
    channel = open_channel(server.address)
    stub: Any = drafts_pb2_grpc.DraftServiceStub(channel)
    try:
        yield Rig(server.address, metrics, registry, attendants, desk, conductor, incoming, stub)
    finally:
        await channel.close()
        attendants.close()
        await server.drain(5.0)
        await desk.close()


class Attending:
    """A worker's call as the wire has it."""

    def __init__(self, stub: Any) -> None:
        self.call = stub.Attend()

    async def say(self, **fields: Any) -> None:
        """Send one message."""
        await self.call.write(drafts_pb2.AttendRequest(**fields))

    async def begin(self, worker_id: str = "decode-0", **fields: Any) -> None:
        """Say who it is."""
        known = {"model_digest": DIGEST, "machine": "here", **fields}
        await self.say(worker_id=worker_id, **known)

    async def hear(self, timeout_s: float = 5.0) -> tuple[DraftEntry, ...]:
        """Return the next plan."""
        async with asyncio.timeout(timeout_s):
            response = await self.call.read()
        assert response is not grpc.aio.EOF
        return tuple(map(entry_from_proto, response.entries))

    async def hear_change(self, last: tuple[DraftEntry, ...]) -> tuple[DraftEntry, ...]:
        """Return the next plan that is another one."""
        while (plan := await self.hear()) == last:
            pass
        return plan


@asynccontextmanager
async def attending(stub: Any) -> AsyncIterator[Attending]:
    """Open a call for the length of a block."""
    worker = Attending(stub)
    try:
        yield worker
    finally:
        worker.call.cancel()


@asynccontextmanager
async def conducted(directory: Path) -> AsyncIterator[Rig]:
    """Serve a registry while its conductor works."""
    async with trainer_rig(directory) as rig:
        running = asyncio.create_task(rig.conductor.run())
        try:
            yield rig
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
