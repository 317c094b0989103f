"""`python -m paceline.gateway`: the public door of a fleet."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import replace

from paceline import __version__
from paceline.domain.errors import UnavailableError
from paceline.domain.member import Load, Member, Role
from paceline.gateway.auth import Authenticator
from paceline.gateway.fleet import FleetView
from paceline.gateway.http import create_app
from paceline.gateway.parking import create_parking
from paceline.gateway.pipeline import Pipeline
from paceline.gateway.routing import create_policy
from paceline.gateway.server import SERVICE_NAME, InferenceServicer
from paceline.gateway.settings import GatewaySettings
from paceline.gateway.steps.lookup import LookupStep
from paceline.gateway.steps.route import RouteStep
from paceline.gateway.steps.tokenise import TokeniseStep
from paceline.gateway.tokenizer import ModelTokenizer
from paceline.kvstore.index import BlockIndex
from paceline.process.http_server import HttpServer
from paceline.process.lifecycle import Tasks, exit_with_parent, stop_event
from paceline.process.logs import setup_logging
from paceline.process.membership import Heartbeat, Membership
from paceline.process.metrics import Metrics
from paceline.rpc.server import GrpcServer, create_server
from paceline.v1 import inference_pb2_grpc

logger = logging.getLogger("paceline.gateway")

_ADD_SERVICER: Callable[..., None] = inference_pb2_grpc.add_InferenceServiceServicer_to_server
_READY_POLL_S = 0.1


async def serve(settings: GatewaySettings) -> int:
    """Run the gateway until a signal; return the exit code."""
    stop = stop_event()
    metrics = Metrics("gateway", model=settings.model_name)
    tracer = settings.create_tracer(
        "gateway", _member_id(settings), metrics.trace_spans_dropped.inc
    )
    tasks = Tasks(stop)
    tokenizer = ModelTokenizer(settings.model)
    authenticator = Authenticator.from_file(settings.api_keys)
    on_call = metrics.redis_seconds.observe
    membership = Membership(settings.redis_url, settings.fleet, on_call=on_call)
    fleet = FleetView(membership, settings.model_name, metrics.redis_up.set)
    index = BlockIndex(settings.redis_url, settings.fleet, on_call=on_call)
    tokenise = TokeniseStep(tokenizer, settings.default_max_tokens, lambda: secrets.randbits(64))
    lookup = LookupStep(index)
    parking = create_parking(fleet, settings)
    policy = create_policy(settings.routing_policy)
    route = RouteStep(fleet, policy, parking, settings, metrics)
    pipeline = Pipeline(settings, fleet, tokenizer, tokenise, lookup, parking, route, metrics)

    servicer = InferenceServicer(pipeline, tokenise, fleet, authenticator, settings)
    app = create_app(fleet, pipeline, metrics, stop.is_set, settings)
    http = HttpServer(app, settings.host, settings.http_port)
    server = create_server(
        metrics,
        [SERVICE_NAME],
        [lambda target: _ADD_SERVICER(servicer, target)],
        host=settings.host,
        port=settings.grpc_port,
        max_message_bytes=settings.max_message_bytes,
        write_timeout_s=settings.slow_client_timeout_s,
        tracer=tracer,
        is_door=True,
    )
    await server.start()
    member = _member(settings, server, http)

    def current() -> Member:
        return replace(member, is_draining=stop.is_set(), load=Load(num_waiting=parking.num_parked))

    heartbeat = Heartbeat(membership, current)
    tasks.spawn(fleet.run(), "fleet", is_vital=True)
    tasks.spawn(parking.run(), "parking", is_vital=True)
    tasks.spawn(heartbeat.run(), "heartbeat", is_vital=True)
    serving_http = tasks.spawn(http.run(), "http", is_vital=True)
    readiness = tasks.spawn(_follow_readiness(server, fleet), "readiness", is_vital=True)
    logger.info("listening", extra={"fields": {"grpc": server.address, "http": http.port}})

    await stop.wait()
    logger.info("draining", extra={"fields": {"requests": pipeline.admission.num_running}})
    has_crashed = tasks.has_vital_crash
    readiness.cancel()
    parking.close()
    await server.drain(0.0 if has_crashed else settings.drain_grace_s)
    await http.close(serving_http)
    await tasks.close()
    try:
        await membership.deregister(member)
    except UnavailableError as error:
        logger.info("deregister-failed", extra={"fields": {"error": error.message}})
    await fleet.close()
    await index.close()
    await membership.close()
    tracer.close()
    return 1 if has_crashed else 0


def _member_id(settings: GatewaySettings) -> str:
    return settings.member_id or f"gateway-{os.getpid()}"


def _member(settings: GatewaySettings, server: GrpcServer, http: HttpServer) -> Member:
    return Member(
        id=_member_id(settings),
        role=Role.GATEWAY,
        address=server.address,
        pid=os.getpid(),
        version=__version__,
        metrics_address=f"{settings.host}:{http.port}",
    )


async def _follow_readiness(server: GrpcServer, fleet: FleetView) -> None:
    """Report SERVING while requests are welcome. Redis is not needed for that."""
    is_ready: bool | None = None
    while True:
        if fleet.is_ready != is_ready:
            is_ready = fleet.is_ready
            server.set_ready(is_ready)
            logger.info("readiness", extra={"fields": {"is_ready": is_ready}})
        await asyncio.sleep(_READY_POLL_S)


def _check_exposure(settings: GatewaySettings) -> None:
    """Refuse to serve everybody by accident."""
    try:
        is_local = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_local = settings.host == "localhost"
    if not is_local and settings.api_keys is None and not settings.allow_anonymous:
        raise ValueError(f"host {settings.host}: api_keys or allow_anonymous is needed there")


def main(argv: list[str] | None = None) -> int:
    """Load settings, run, return the exit code."""
    exit_with_parent()
    settings = GatewaySettings.load(argv)
    setup_logging(settings.member_id or "gateway", settings.log_level)
    logger.info("starting", extra={"fields": {"settings": settings.describe()}})
    try:
        _check_exposure(settings)
        return asyncio.run(serve(settings))
    except (OSError, ValueError) as error:
        logger.error("start-failed", extra={"fields": {"error": str(error)}})
        return 1


if __name__ == "__main__":
    sys.exit(main())
