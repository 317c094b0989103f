"""The gateway's HTTP port: metrics, health, status. No inference here yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from paceline import __version__
from paceline.domain.member import Member
from paceline.gateway.fleet import FleetView
from paceline.gateway.pipeline import Pipeline
from paceline.gateway.settings import GatewaySettings
from paceline.process.http_server import Page, pages
from paceline.process.metrics import Metrics


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

    own: dict[str, Page] = {"/metrics/targets": targets, "/readyz": readyz, "/status": status}
    return pages(metrics, own)


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
