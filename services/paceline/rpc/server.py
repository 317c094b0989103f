"""Builds the gRPC server that every process of the platform runs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from paceline.process.metrics import Metrics
from paceline.process.spans import NO_TRACER, Tracer
from paceline.rpc import health
from paceline.rpc.interceptors import WRITE_TIMEOUT_S, CallGate, CallInterceptor

MAX_MESSAGE_BYTES = 4 << 20

_STOP_GRACE_S = 0.1
"""Time for the last replies to leave."""


class GrpcServer:
    """A server with health, reflection and an orderly end."""

    def __init__(
        self,
        metrics: Metrics,
        gate: CallGate,
        server: grpc.aio.Server,
        servicer: health.HealthServicer,
        host: str,
        port: int,
    ) -> None:
        self._metrics = metrics
        self._gate = gate
        self._server = server
        self._health = servicer
        self._host = host
        self.port = port

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self._host}:{self.port}"

    async def start(self) -> None:
        """Accept calls; health says NOT_SERVING until `set_ready`."""
        self._metrics.watch_loop(asyncio.get_running_loop())
        await self._server.start()

    def set_ready(self, is_ready: bool) -> None:
        """Tell health checks whether work is welcome."""
        self._health.set_ready(is_ready)

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls, let running ones finish for `grace_s`, then end them."""
        # gRPC's own stop cancels calls that are on their way, which looks like the caller's will.
        self._gate.is_closed = True
        self._health.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._gate.is_idle.wait()
        await self._server.stop(_STOP_GRACE_S)


def create_server(
    metrics: Metrics,
    service_names: Sequence[str],
    servicer_adders: Sequence[Callable[[grpc.aio.Server], None]],
    *,
    host: str,
    port: int,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    write_timeout_s: float = WRITE_TIMEOUT_S,
    tracer: Tracer = NO_TRACER,
    is_door: bool = False,
) -> GrpcServer:
    """Create a server bound to host:port; port 0 takes any free one.

    A streaming call whose client reads nothing for `write_timeout_s` is ended. At a door every
    call is traced by `tracer`; elsewhere those are that belong to a trace.

    Raises:
        OSError: the address cannot be bound; the message says why.
    """
    _check_port(host, port)
    _count_from_zero(metrics, service_names)
    interceptor = CallInterceptor(
        metrics, write_timeout_s=write_timeout_s, tracer=tracer, is_door=is_door
    )
    server = grpc.aio.server(
        interceptors=[interceptor],
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # Vanished clients are noticed after 30 s; ours may ping as often.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            # Without these a stalled reader lets the server run megabytes ahead.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 65_536),
        ],
    )
    for add in servicer_adders:
        add(server)
    servicer = health.HealthServicer(service_names)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = [*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"{host}:{port} cannot be bound") from error
    if bound == 0:
        raise OSError(f"{host}:{port} cannot be bound")
    return GrpcServer(metrics, interceptor.gate, server, servicer, host, bound)


def _count_from_zero(metrics: Metrics, service_names: Sequence[str]) -> None:
    """Make the series of successful calls, so that their rates exist before the first one."""
    for name in service_names:
        for method in descriptor_pool.Default().FindServiceByName(name).methods:
            path = f"/{name}/{method.name}"
            metrics.rpc_requests.labels(path, "OK", "")
            metrics.rpc_seconds.labels(path)


def _check_port(host: str, port: int) -> None:
    """Bind once by hand: gRPC does not say what is wrong, and writes to stderr itself."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
