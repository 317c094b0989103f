"""`python -m paceline.worker`: one engine, one role, one place in the fleet."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from paceline import __version__
from paceline.decode.server import DecodeServicer
from paceline.domain.blocks import LAYOUT_VERSION
from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member, ModelCard, Role
from paceline.kvstore.values import KvLayoutInfo
from paceline.prefill.server import PrefillServicer
from paceline.process.lifecycle import Tasks, exit_with_parent, stop_event
from paceline.process.logs import setup_logging
from paceline.process.membership import Heartbeat, Membership
from paceline.process.metrics import Metrics, serve_metrics
from paceline.rpc.server import GrpcServer, create_server
from paceline.v1 import engine_pb2, worker_pb2_grpc
from paceline.worker.bridge import EngineBridge, step_cost_of
from paceline.worker.kv_link import KvLink
from paceline.worker.settings import WorkerSettings

logger = logging.getLogger("paceline.worker")

_SERVICES = {Role.PREFILL: "paceline.v1.PrefillService", Role.DECODE: "paceline.v1.DecodeService"}


async def serve(settings: WorkerSettings) -> int:
    """Run the worker until a signal; return the exit code."""
    stop = stop_event()
    metrics = Metrics("worker", model=served_name(settings))
    tasks = Tasks(stop)
    bridge = EngineBridge(metrics)
    membership = Membership(settings.redis_url, settings.fleet)
    ready = await bridge.start(settings.engine_options().to_json())
    tasks.spawn(bridge.run(), "engine", is_vital=True)

    layout = _layout(ready)
    find_node = NodeFinder(settings.kv_node, membership)
    link = KvLink(bridge, layout, settings.member_id, find_node, metrics, tasks)
    if settings.kv_node:
        tasks.spawn(link.run(), "kv-link", is_vital=True)

    role = Role(settings.role)
    server = _server(settings, role, bridge, metrics)
    await server.start()
    exposed = serve_metrics(metrics, settings.host, settings.metrics_port)
    member = Member(
        id=settings.member_id or f"{settings.role}-{os.getpid()}",
        role=role,
        address=server.address,
        pid=os.getpid(),
        version=__version__,
        metrics_address=f"{settings.host}:{exposed.port}",
        model=_card(settings, ready),
        step_cost=step_cost_of(ready),
        prefill_chunk_tokens=settings.chunk_tokens,
    )
    presence = Presence(member, bridge, link)
    heartbeat = Heartbeat(membership, presence.current)
    tasks.spawn(heartbeat.run(), "heartbeat", is_vital=True)
    server.set_ready(True)
    logger.info("ready", extra={"fields": {"member": member.id, "address": server.address}})

    await stop.wait()
    logger.info("draining", extra={"fields": {"requests": bridge.num_requests}})
    presence.is_draining = True
    has_crashed = tasks.has_vital_crash
    await server.drain(0.0 if has_crashed else settings.drain_grace_s)
    await tasks.close()
    await leave(membership, presence.current())
    await bridge.close()
    exposed.close()
    return 1 if has_crashed else 0


class Presence:
    """The worker's entry in the membership, as of now."""

    def __init__(self, member: Member, bridge: EngineBridge, link: KvLink) -> None:
        self._member = member
        self._bridge = bridge
        self._link = link
        self.is_draining = False

    def current(self) -> Member:
        """Return the member with its present load and node."""
        return replace(
            self._member,
            load=self._bridge.load,
            node_id=self._link.node_id,
            is_draining=self.is_draining,
        )


class NodeFinder:
    """Finds the address of the worker's KV node: a fixed address, or a member by id."""

    def __init__(self, kv_node: str, membership: Membership) -> None:
        self._kv_node = kv_node
        self._membership = membership

    async def __call__(self) -> str | None:
        """Return host:port, or None while the node is not registered."""
        if ":" in self._kv_node:
            return self._kv_node
        try:
            members = await self._membership.members()
        except UnavailableError:
            return None
        for member in members:
            if member.role is Role.KVSTORE and member.id == self._kv_node:
                return member.address
        return None


async def leave(membership: Membership, member: Member) -> None:
    """Take the worker out of the fleet; without Redis its lease ends by itself."""
    try:
        await membership.deregister(member)
    except UnavailableError as error:
        logger.warning("deregister-failed", extra={"fields": {"error": error.message}})
    await membership.close()


def served_name(settings: WorkerSettings) -> str:
    """Return the name clients use for the model."""
    return settings.served_model_name or Path(settings.model).resolve().name


def _server(
    settings: WorkerSettings, role: Role, bridge: EngineBridge, metrics: Metrics
) -> GrpcServer:
    if role is Role.PREFILL:
        adder = worker_pb2_grpc.add_PrefillServiceServicer_to_server
        servicer: object = PrefillServicer(bridge)
    else:
        adder = worker_pb2_grpc.add_DecodeServiceServicer_to_server
        servicer = DecodeServicer(bridge)
    return create_server(
        metrics,
        [_SERVICES[role]],
        [lambda server: adder(servicer, server)],
        host=settings.host,
        port=settings.port,
    )


def _layout(ready: engine_pb2.EngineReady) -> KvLayoutInfo:
    layout = ready.layout
    return KvLayoutInfo(
        kv_root=layout.kv_root,
        layout_version=LAYOUT_VERSION,
        dtype=layout.dtype,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_bytes=layout.block_bytes,
    )


def _card(settings: WorkerSettings, ready: engine_pb2.EngineReady) -> ModelCard:
    return ModelCard(
        name=served_name(settings),
        digest=ready.model_digest,
        kv_root=ready.layout.kv_root,
        block_size=ready.layout.block_size,
        block_bytes=ready.layout.block_bytes,
        max_context_tokens=ready.max_context_tokens,
        vocab_size=ready.vocab_size,
    )


def main(argv: list[str] | None = None) -> int:
    """Load settings, run, return the exit code."""
    exit_with_parent()
    settings = WorkerSettings.load(argv)
    setup_logging(settings.member_id or settings.role, settings.log_level)
    try:
        return asyncio.run(serve(settings))
    except UnavailableError as error:
        fields = {"reason": error.reason, "error": error.message}
        logger.error("start-failed", extra={"fields": fields})
        return 1


if __name__ == "__main__":
    sys.exit(main())
