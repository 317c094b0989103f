"""`python -m paceline.worker`: one engine, one role, one place in the fleet."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import grpc

from paceline import __version__
from paceline.decode.server import DecodeServicer
from paceline.domain.blocks import LAYOUT_VERSION
from paceline.domain.cost import StepShape
from paceline.domain.errors import UnavailableError
from paceline.domain.learnings import Sample, SequenceOutcome
from paceline.domain.member import Member, ModelCard, Role
from paceline.kvstore.values import KvLayoutInfo
from paceline.prefill.server import PrefillServicer
from paceline.process.lifecycle import Tasks, exit_with_parent, stop_event
from paceline.process.logs import setup_logging
from paceline.process.membership import Heartbeat, Membership
from paceline.process.metrics import Metrics, serve_metrics
from paceline.process.sample_stream import SampleStream
from paceline.process.spans import Tracer
from paceline.rpc.codec import step_cost_from_proto
from paceline.rpc.server import GrpcServer, create_server
from paceline.v1 import engine_pb2, worker_pb2_grpc
from paceline.worker.admin import WorkerServicer
from paceline.worker.bridge import EngineBridge
from paceline.worker.kv_link import KvLink
from paceline.worker.samples import SamplePublisher
from paceline.worker.settings import WorkerSettings
from paceline.worker.trainer_link import TrainerLink

logger = logging.getLogger("paceline.worker")

_LAST_WORDS_S = 1.0
"""Time for the errors of ended streams to reach their callers."""

_STALL_STEPS = 10

_SERVICES = {Role.PREFILL: "paceline.v1.PrefillService", Role.DECODE: "paceline.v1.DecodeService"}


async def serve(settings: WorkerSettings) -> int:
    """Run the worker until a signal; return the exit code.

    Raises:
        UnavailableError: the engine did not start.
        OSError: a port is taken.
    """
    stop = stop_event()
    async with AsyncExitStack() as stack:
        metrics = Metrics("worker", model=served_name(settings))
        bridge = EngineBridge(metrics, max_requests=settings.max_requests)
        stack.push_async_callback(bridge.close)
        ready = await _start(bridge, settings, stop)
        if ready is None:
            return 0
        on_call = metrics.redis_seconds.observe
        membership = Membership(settings.redis_url, settings.fleet, on_call=on_call)
        stack.push_async_callback(membership.close)
        tasks = Tasks(stop)
        stack.push_async_callback(tasks.close)
        tasks.spawn(bridge.run(_stall_s(settings, ready)), "engine", is_vital=True)

        find_node = NodeFinder(settings.kv_node, membership)
        link = KvLink(bridge, _layout(ready), worker_id(settings), find_node, metrics, tasks)
        if settings.kv_node:
            tasks.spawn(link.run(), "kv-link", is_vital=True)
        stream = SampleStream(
            settings.redis_url, settings.fleet, ready.model_digest, on_call=on_call
        )
        stack.push_async_callback(stream.close)
        publisher = SamplePublisher(stream, metrics)
        trainer_link = TrainerLink(settings, worker_id(settings), ready, bridge, metrics)

        def learn(samples: Sequence[Sample], outcomes: Sequence[SequenceOutcome]) -> None:
            publisher.push(samples)
            trainer_link.outbox.put_outcomes(outcomes)

        bridge.on_learnings = learn
        tasks.spawn(trainer_link.run(membership, tasks), "trainer-link", is_vital=True)
        tasks.spawn(publisher.run(), "samples")
        on_dropped = metrics.trace_spans_dropped.inc
        tracer = settings.create_tracer(settings.role, worker_id(settings), on_dropped)
        stack.callback(tracer.close)
        server = _server(settings, bridge, metrics, tracer)
        exposed = serve_metrics(metrics, settings.host, settings.metrics_port)
        stack.callback(exposed.close)
        await server.start()
        member = _member(settings, ready, server.address, f"{settings.host}:{exposed.port}")
        presence = Presence(member, bridge, link)
        heartbeat = Heartbeat(membership, presence.current, on_state=metrics.redis_up.set)
        tasks.spawn(heartbeat.run(), "heartbeat", is_vital=True)
        server.set_ready(True)
        logger.info("ready", extra={"fields": {"member": member.id, "address": server.address}})

        await stop.wait()
        await _drain(settings, server, bridge, presence, heartbeat, tasks)
        has_crashed = tasks.has_vital_crash
        await tasks.close()
        await leave(membership, presence.current())
        logger.info("stopped", extra={"fields": {"has_crashed": has_crashed}})
    return 1 if has_crashed else 0


async def _start(
    bridge: EngineBridge, settings: WorkerSettings, stop: asyncio.Event
) -> engine_pb2.EngineReady | None:
    """Start the engine; None if the worker is told to stop meanwhile."""
    name = f"{worker_id(settings)}-engine"
    options = settings.engine_options().to_json()
    starting = asyncio.create_task(
        bridge.start(options, service=name, log_level=settings.log_level)
    )
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return await starting if starting.done() else None
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


async def _drain(
    settings: WorkerSettings,
    server: GrpcServer,
    bridge: EngineBridge,
    presence: Presence,
    heartbeat: Heartbeat,
    tasks: Tasks,
) -> None:
    """Tell the fleet, refuse new calls, let running ones finish while there is time."""
    logger.info("draining", extra={"fields": {"requests": bridge.num_requests}})
    presence.is_draining = True
    if tasks.has_vital_crash:
        bridge.fail_streams(_stopping)
        return await server.drain(_LAST_WORDS_S)
    if heartbeat.is_connected:
        await asyncio.sleep(settings.drain_notice_s)
    loop = asyncio.get_running_loop()
    # Before the server cuts them off, so that callers learn that they may go elsewhere.
    end = loop.call_later(settings.drain_grace_s, bridge.fail_streams, _stopping)
    try:
        await server.drain(settings.drain_grace_s + _LAST_WORDS_S)
    finally:
        end.cancel()


def _stopping() -> UnavailableError:
    return UnavailableError("the worker stops", reason="worker-stopping")


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
            drafters=self._bridge.drafters,
            draft_version=self._bridge.draft_version,
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


def served_name(settings: WorkerSettings) -> str:
    """Return the name clients use for the model."""
    return settings.served_model_name or Path(settings.model).resolve().name


def worker_id(settings: WorkerSettings) -> str:
    """Return the worker's name in the fleet."""
    return settings.member_id or f"{settings.role}-{os.getpid()}"


def _member(
    settings: WorkerSettings, ready: engine_pb2.EngineReady, address: str, metrics_address: str
) -> Member:
    return Member(
        id=worker_id(settings),
        role=Role(settings.role),
        address=address,
        pid=os.getpid(),
        version=__version__,
        metrics_address=metrics_address,
        model=_card(settings, ready),
        step_cost=step_cost_from_proto(ready.step_cost),
        prefill_chunk_tokens=settings.chunk_tokens,
        max_rows=settings.max_num_seqs,
        drafters=tuple(ready.drafters),
        draft_version=ready.draft_version,
    )


def _stall_s(settings: WorkerSettings, ready: engine_pb2.EngineReady) -> float:
    """Return how long the engine may be silent: some steps of the largest kind."""
    tokens, rows, longest = settings.chunk_tokens, settings.max_num_seqs, ready.max_context_tokens
    # Whatever the rows attend to lies in the pool.
    attended = min(rows * longest, ready.num_kv_blocks * ready.layout.block_size)
    nodes = rows * settings.draft_nodes if ready.drafters else 0
    decoding = StepShape(rows=rows, tree_nodes=nodes, attended=attended)
    largest = decoding.with_chunk(tokens, max(0, longest - tokens))
    step_s = step_cost_from_proto(ready.step_cost).step_s(largest)
    return max(settings.engine_stall_s, _STALL_STEPS * step_s)


def _server(
    settings: WorkerSettings, bridge: EngineBridge, metrics: Metrics, tracer: Tracer
) -> GrpcServer:
    def add(server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(bridge), server)
        if settings.role == Role.PREFILL.value:
            worker_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(bridge), server)
        else:
            worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(bridge), server)

    names = ["paceline.v1.WorkerService", _SERVICES[Role(settings.role)]]
    return create_server(
        metrics, names, [add], host=settings.host, port=settings.port, tracer=tracer
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
        kv_dtype=ready.layout.dtype,
    )


def main(argv: list[str] | None = None) -> int:
    """Load settings, run, return the exit code."""
    exit_with_parent()
    settings = WorkerSettings.load(argv)
    setup_logging(worker_id(settings), settings.log_level)
    logger.info("starting", extra={"fields": {"settings": settings.describe()}})
    try:
        return asyncio.run(serve(settings))
    except (UnavailableError, OSError) as error:
        fields = {"reason": getattr(error, "reason", "os-error"), "error": str(error)}
        logger.error("start-failed", extra={"fields": fields})
        return 1


if __name__ == "__main__":
    sys.exit(main())
