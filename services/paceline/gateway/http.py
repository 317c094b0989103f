"""The gateway's HTTP port: metrics, health, status. No inference here yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from paceline import __version__
from paceline.domain.member import Member
from paceline.gateway.admission import Admission
from paceline.gateway.fleet import FleetView
from paceline.process.http_server import pages
from paceline.process.metrics import Metrics


def create_app(
    fleet: FleetView, admission: Admission, metrics: Metrics, is_draining: Callable[[], bool]
) -> Starlette:
    """Return the application.

    /metrics  Prometheus text     /healthz  the process lives
    /status   the fleet, as JSON  /readyz   new requests are welcome and can be served
    """

    async def readyz(_: Request) -> Response:
        if is_draining():
            return PlainTextResponse("draining\n", 503)
        is_ready = fleet.card() is not None
        text = "ready\n" if is_ready else "no decode worker is ready\n"
        return PlainTextResponse(text, 200 if is_ready else 503)

    async def status(_: Request) -> Response:
        return JSONResponse(fleet_status(fleet, admission))

    return pages(metrics, {"/readyz": readyz, "/status": status})


def fleet_status(fleet: FleetView, admission: Admission) -> dict[str, Any]:
    """Return what `paceline status` shows."""
    card = fleet.card()
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
