"""The gateway's HTTP port: metrics, health, status. No inference here yet."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from paceline import __version__
from paceline.domain.member import Member
from paceline.gateway.fleet import FleetView
from paceline.gateway.pipeline import Pipeline
from paceline.gateway.settings import GatewaySettings
from paceline.process.metrics import Metrics

_BACKLOG = 128


def create_app(
    fleet: FleetView,
    pipeline: Pipeline,
    metrics: Metrics,
    is_draining: Callable[[], bool],
    settings: GatewaySettings,
) -> Starlette:
    """Return the application.

    /metrics  Prometheus text     /metrics/targets  who has such a page, for its discovery
    /healthz  the process lives   /readyz           new requests are welcome and can be served
    /status   the fleet, as JSON
    """

    async def show_metrics(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        if is_draining():
            return PlainTextResponse("draining\n", 503)
        is_ready = fleet.is_ready
        text = "ready\n" if is_ready else "no decode worker is ready\n"
        return PlainTextResponse(text, 200 if is_ready else 503)

    async def status(_: Request) -> Response:
        return JSONResponse(fleet_status(fleet, pipeline))

    async def targets(_: Request) -> Response:
        if not fleet.has_redis and not fleet.members():
            # An empty list would make Prometheus forget the targets it has.
            return PlainTextResponse("no member is known yet\n", 503)
        found = metrics_targets(fleet.members(), settings.fleet, settings.model_name)
        return JSONResponse(found)

    routes = {
        "/metrics": show_metrics,
        "/metrics/targets": targets,
        "/healthz": healthz,
        "/readyz": readyz,
        "/status": status,
    }
    return Starlette(routes=[Route(path, endpoint) for path, endpoint in routes.items()])


def metrics_targets(members: Iterable[Member], fleet: str, model: str) -> list[dict[str, Any]]:
    """Return the metrics pages of members in the form of Prometheus' HTTP discovery.

    Members that serve no model themselves work for the gateway's.
    """
    return [
        {
            "targets": [member.metrics_address],
            "labels": {
                "role": member.role.value,
                "member": member.id,
                "fleet": fleet,
                "model": member.model.name if member.model is not None else model,
            },
        }
        for member in members
        if member.metrics_address
    ]


def fleet_status(fleet: FleetView, pipeline: Pipeline) -> dict[str, Any]:
    """Return what `paceline status` shows."""
    admission, card = pipeline.admission, fleet.card()
    model = None
    if card is not None:
        model = asdict(card)
        model["kv_root"] = card.kv_root.hex()
    return {
        "version": __version__,
        "model": model,
        "has_redis": fleet.has_redis,
        "requests": {
            "running": admission.num_running,
            "parked": pipeline.parking.num_parked,
            "finished": admission.num_finished,
            "failed": admission.num_failed,
        },
        "members": [_member(fleet, member) for member in fleet.members()],
    }


def _member(fleet: FleetView, member: Member) -> dict[str, Any]:
    return {
        "id": member.id,
        "role": member.role.value,
        "address": member.address,
        "metrics_address": member.metrics_address,
        "pid": member.pid,
        "version": member.version,
        "epoch": member.epoch,
        "node_id": member.node_id,
        "is_draining": member.is_draining,
        "is_suspect": fleet.is_suspect(member),
        "drafters": list(member.drafters),
        "draft_version": member.draft_version,
        "load": asdict(member.load),
    }


class HttpServer:
    """Serves an application on a socket that was bound before anything else started."""

    def __init__(self, app: Starlette, host: str, port: int) -> None:
        """Bind.

        Raises:
            OSError: the port is taken.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            # Before this the port is not really taken: somebody else could bind it too.
            self._socket.listen(_BACKLOG)
        except OSError as error:
            self._socket.close()
            raise OSError(f"{host}:{port} cannot be bound, is it taken?") from error
        self.port = int(self._socket.getsockname()[1])
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
        self._server = _Server(config)

    async def run(self) -> None:
        """Serve until `close` or cancelled."""
        await self._server.serve(sockets=[self._socket])

    async def close(self, task: asyncio.Task[None], timeout_s: float = 2.0) -> None:
        """Stop serving and wait for the task that runs it."""
        self._server.should_exit = True
        await asyncio.wait({task}, timeout=timeout_s)
        self._socket.close()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the process has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
