"""The autoscaler's HTTP port: metrics, health, and the last decisions with their reasons."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from paceline import __version__
from paceline.autoscaler.journal import Journal, entry_to_json
from paceline.process.http_server import pages
from paceline.process.metrics import Metrics

_DEFAULT_LAST = 20


def create_app(
    journal: Journal, metrics: Metrics, describe: dict[str, str], why_not_ready: Callable[[], str]
) -> Starlette:
    """Return the application.

    /metrics    Prometheus text          /healthz  the process lives
    /decisions  JSON; ?last=N entries,   /readyz   decisions are made, or would be if the one
                oldest first                       that makes them went away
    """

    async def readyz(_: Request) -> Response:
        reason = why_not_ready()
        return PlainTextResponse(f"{reason or 'ready'}\n", 503 if reason else 200)

    async def decisions(request: Request) -> Response:
        last = request.query_params.get("last", str(_DEFAULT_LAST))
        if not last.isdecimal() or len(last) > 9:
            return PlainTextResponse("last: a number of decisions\n", 400)
        entries = [entry_to_json(entry) for entry in journal.last(int(last))]
        return JSONResponse({"version": __version__, **describe, "decisions": entries})

    return pages(metrics, {"/readyz": readyz, "/decisions": decisions})
