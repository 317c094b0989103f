"""A process's HTTP port: metrics and liveness, which all have, and pages of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from paceline.process.metrics import Metrics

_BACKLOG = 128

Page = Callable[[Request], Awaitable[Response]]


def pages(metrics: Metrics, own: Mapping[str, Page]) -> Starlette:
    """Return an application with /metrics (Prometheus text), /healthz (the process lives) and
    the process's own pages by path.
    """

    async def show_metrics(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    routes: dict[str, Page] = {"/metrics": show_metrics, "/healthz": healthz, **own}
    return Starlette(routes=[Route(path, page) for path, page in routes.items()])


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
