"""Builds the gRPC server that every process of the platform runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from paceline.process.metrics import Metrics
from paceline.rpc.interceptors import CallInterceptor

MAX_MESSAGE_BYTES = 4 << 20

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class GrpcServer:
    """A server with health, reflection and an orderly end."""

    def __init__(
        self, server: grpc.aio.Server, health: Any, names: Sequence[str], host: str, port: int
    ) -> None:
        self._server = server
        self._health = health
        self._names = ["", *names]
        self._host = host
        self.port = port

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self._host}:{self.port}"

    async def start(self) -> None:
        """Accept calls; health says NOT_SERVING until `set_ready`."""
        await self._set(_NOT_SERVING)
        await self._server.start()

    def set_ready(self, is_ready: bool) -> None:
        """Tell health checks whether work is welcome."""
        self._setting = asyncio.create_task(self._set(_SERVING if is_ready else _NOT_SERVING))

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls, let running ones finish for `grace_s`, then end them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _set(self, status: Any) -> None:
        for name in self._names:
            await self._health.set(name, status)


def create_server(
    metrics: Metrics,
    service_names: Sequence[str],
    servicer_adders: Sequence[Callable[[grpc.aio.Server], None]],
    *,
    host: str,
    port: int,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> GrpcServer:
    """Create a server bound to host:port; port 0 takes any free one.

    Raises:
        OSError: the port is taken.
    """
    server = grpc.aio.server(
        interceptors=[CallInterceptor(metrics)],
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
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"{host}:{port} cannot be bound, is it taken?") from error
    if bound == 0:
        raise OSError(f"{host}:{port} cannot be bound, is it taken?")
    return GrpcServer(server, health, service_names, host, bound)
