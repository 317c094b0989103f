"""`python -m paceline.kvstore`: one KV node, usually one per machine."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from dataclasses import dataclass

from paceline import __version__
from paceline.domain.errors import AlreadyExistsError, UnavailableError
from paceline.domain.member import Member, Role
from paceline.kvstore.arena_file import ArenaFile
from paceline.kvstore.counters import NodeCounters
from paceline.kvstore.index import BlockIndex
from paceline.kvstore.node import KvNode
from paceline.kvstore.policy import create_policy
from paceline.kvstore.publisher import Publisher
from paceline.kvstore.puller import Puller
from paceline.kvstore.server import SERVICE_NAME, KvNodeServicer
from paceline.kvstore.settings import KvNodeSettings
from paceline.kvstore.store import BlockStore
from paceline.kvstore.telemetry import report_metrics
from paceline.kvstore.transport import Transports
from paceline.process.lifecycle import Tasks, exit_with_parent, stop_event
from paceline.process.logs import setup_logging
from paceline.process.membership import Heartbeat, Membership
from paceline.process.metrics import Metrics, serve_metrics
from paceline.rpc.server import create_server
from paceline.v1 import kvstore_pb2_grpc

logger = logging.getLogger("paceline.kvstore")

_CLEAR_TIMEOUT_S = 1.0


async def serve(settings: KvNodeSettings) -> int:
    """Run the node until a signal; return the exit code."""
    stop = stop_event()
    node_id = settings.member_id or f"kv-{socket.gethostname()}"
    file = ArenaFile(settings.arena_dir, settings.fleet, node_id, settings.arena_mb * 1024 * 1024)
    try:
        return await _serve(settings, node_id, file, stop)
    finally:
        file.close(keep=settings.keep_arena)


async def _serve(
    settings: KvNodeSettings, node_id: str, file: ArenaFile, stop: asyncio.Event
) -> int:
    metrics = Metrics("kvstore")
    tracer = settings.create_tracer("kvstore", node_id, metrics.trace_spans_dropped.inc)
    tasks = Tasks(stop)
    parts = _build(settings, node_id, file, metrics)
    server = create_server(
        metrics,
        [SERVICE_NAME],
        [
            lambda target: kvstore_pb2_grpc.add_KvNodeServiceServicer_to_server(
                KvNodeServicer(parts.node), target
            )
        ],
        host=settings.host,
        port=settings.port,
        tracer=tracer,
    )
    await server.start()
    exposed = serve_metrics(metrics, settings.host, settings.metrics_port)
    address = f"{settings.advertise_host or settings.host}:{server.port}"
    parts.node.set_address(address)
    parts.presence.member = Member(
        id=node_id,
        role=Role.KVSTORE,
        address=address,
        pid=os.getpid(),
        version=__version__,
        metrics_address=f"{settings.host}:{exposed.port}",
        node_id=node_id,
        kv_uri=f"{settings.transport}:{address}",
    )
    tasks.spawn(parts.heartbeat.run(), "heartbeat", is_vital=True)
    tasks.spawn(parts.publisher.run(), "publisher", is_vital=True)
    tasks.spawn(parts.node.run_expiry(), "expiry", is_vital=True)
    tasks.spawn(report_metrics(parts.node, parts.publisher, metrics), "metrics")
    server.set_ready(True)
    logger.info("ready", extra={"fields": {"member": node_id, "address": address}})

    await stop.wait()
    logger.info("draining")
    has_crashed = tasks.has_vital_crash
    parts.node.closing.set()
    await server.drain(0.0 if has_crashed else settings.drain_grace_s)
    await tasks.close()
    await parts.close()
    exposed.close()
    tracer.close()
    return 1 if has_crashed else 0


class Presence:
    """What the node says of itself; the address is known once its server runs."""

    member: Member

    def current(self) -> Member:
        """Return the member."""
        return self.member


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one node, wired."""

    node: KvNode
    puller: Puller
    transports: Transports
    index: BlockIndex
    publisher: Publisher
    membership: Membership
    heartbeat: Heartbeat
    presence: Presence

    async def close(self) -> None:
        """Leave the fleet and the index, close connections."""
        await self.puller.close()
        await self.transports.close()
        try:
            await self.membership.deregister(self.presence.member)
        except UnavailableError as error:
            logger.info("deregister-failed", extra={"fields": {"error": error.message}})
        await self.publisher.clear(_CLEAR_TIMEOUT_S)
        await self.membership.close()
        await self.index.close()


def _build(settings: KvNodeSettings, node_id: str, file: ArenaFile, metrics: Metrics) -> Parts:
    presence = Presence()
    on_call = metrics.redis_seconds.observe
    membership = Membership(settings.redis_url, settings.fleet, on_call=on_call)
    heartbeat = Heartbeat(membership, presence.current, on_state=metrics.redis_up.set)
    index = BlockIndex(settings.redis_url, settings.fleet, on_call=on_call)
    publisher = Publisher(
        index,
        node_id,
        get_epoch=lambda: heartbeat.epoch,
        get_roots=lambda: list(store.shelves.layouts),
        get_keys=lambda root: store.shelves.shared_keys(root),
    )
    slabs = list(file.recover())
    store = BlockStore(
        file,
        lambda: create_policy(settings.policy),
        lease_s=settings.lease_s,
        next_generation=file.next_generation,
        on_change=publisher.note,
    )
    now_s = asyncio.get_running_loop().time()
    for slab in slabs:
        store.restore(slab.slab, slab.shape, slab.blocks, slab.unfinished, now_s)
    if slabs:
        fields = {"blocks": store.usage().num_blocks, "epoch": file.epoch}
        logger.info("arena-recovered", extra={"fields": fields})
    counters = NodeCounters()
    transports = Transports("grpc" if settings.transport == "grpc" else None)
    timeout_s = settings.pull_timeout_s
    on_fetch = metrics.kv_node_pull_seconds.observe
    puller = Puller(store, file, transports, counters, timeout_s=timeout_s, on_fetch=on_fetch)
    node = KvNode(node_id, file, store, puller, publisher, counters, pull_timeout_s=timeout_s)
    return Parts(node, puller, transports, index, publisher, membership, heartbeat, presence)


def main(argv: list[str] | None = None) -> int:
    """Load settings, run, return the exit code."""
    exit_with_parent()
    settings = KvNodeSettings.load(argv)
    setup_logging(settings.member_id or "kvstore", settings.log_level)
    logger.info("starting", extra={"fields": {"settings": settings.describe()}})
    try:
        return asyncio.run(serve(settings))
    except (AlreadyExistsError, OSError, ValueError) as error:
        logger.error("start-failed", extra={"fields": {"error": str(error)}})
        return 1


if __name__ == "__main__":
    sys.exit(main())
