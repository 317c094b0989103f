"""A server that speaks the Kubernetes API for what scaling touches: scales, pods, autoscalers.

Answers have the fields and the status objects of a real API server; versions move and conflict as
there. Failures are queued per path.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paceline.process.http_server import HttpServer

TOKEN = "t0ken"
NAMESPACE = "llm"

_APPS = "/apis/apps/v1/namespaces/{namespace}/deployments/{name}/scale"
_PODS = "/api/v1/namespaces/{namespace}/pods/{name}"
_SCALERS = "/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers"


@dataclass
class Cluster:
    """What the server holds, and what it was asked."""

    replicas: dict[str, int] = field(default_factory=lambda: {"prefill": 1, "decode": 2})
    versions: dict[str, int] = field(default_factory=lambda: defaultdict(lambda: 7))
    pods: dict[str, dict[str, str]] = field(default_factory=dict)
    """Annotations by pod."""
    scalers: dict[str, str] = field(default_factory=dict)
    """Autoscaler -> Deployment."""
    failures: dict[str, list[Response]] = field(default_factory=lambda: defaultdict(list))
    """Answers to give instead, by verb and last name of the path ("PATCH scale")."""
    forbidden: set[str] = field(default_factory=set)
    """Verbs and kinds that the account may not ("list horizontalpodautoscalers")."""
    requests: list[str] = field(default_factory=list)
    conflicts: int = 0
    """Changes of status that come between the next reads and writes."""
    hangs: bool = False

    def touch(self, name: str) -> None:
        """Change a Deployment's version, as its status does."""
        self.versions[name] += 1

    def app(self) -> Starlette:
        """Return the API."""
        return Starlette(
            routes=[
                Route(_APPS, self._scale, methods=["GET", "PATCH"]),
                Route(_PODS, self._pod, methods=["PATCH"]),
                Route(_SCALERS, self._list_scalers, methods=["GET"]),
            ]
        )

    async def _scale(self, request: Request) -> Response:
        name = request.path_params["name"]
        if (early := await self._early(request, "deployments/scale")) is not None:
            return early
        if name not in self.replicas:
            return status(404, f'deployments.apps "{name}" not found')
        if request.method == "PATCH":
            assert request.headers["content-type"] == "application/merge-patch+json"
            body = await request.json()
            assert set(body) <= {"metadata", "spec"} and set(body["spec"]) == {"replicas"}
            if self.conflicts > 0:
                self.conflicts -= 1
                self.touch(name)
            wanted = body.get("metadata", {}).get("resourceVersion")
            if wanted is not None and wanted != str(self.versions[name]):
                text = f'Operation cannot be fulfilled on deployments.apps "{name}": modified'
                return status(409, text)
            self.replicas[name] = body["spec"]["replicas"]
            self.touch(name)
        spec = {"replicas": self.replicas[name]} if self.replicas[name] else {}
        version = str(self.versions[name])
        return JSONResponse(
            {
                "kind": "Scale",
                "apiVersion": "autoscaling/v1",
                "metadata": {"name": name, "namespace": NAMESPACE, "resourceVersion": version},
                "spec": spec,
                "status": {"replicas": self.replicas[name], "selector": f"app={name}"},
            }
        )

    async def _pod(self, request: Request) -> Response:
        name = request.path_params["name"]
        if (early := await self._early(request, "pods")) is not None:
            return early
        if name not in self.pods:
            return status(404, f'pods "{name}" not found')
        for key, value in (await request.json())["metadata"]["annotations"].items():
            if value is None:
                self.pods[name].pop(key, None)
            else:
                self.pods[name][key] = value
        metadata = {"name": name, "annotations": self.pods[name]}
        return JSONResponse({"kind": "Pod", "apiVersion": "v1", "metadata": metadata})

    async def _list_scalers(self, request: Request) -> Response:
        if (early := await self._early(request, "horizontalpodautoscalers")) is not None:
            return early
        items = [
            {
                "metadata": {"name": name},
                "spec": {"scaleTargetRef": {"kind": "Deployment", "name": owned}},
            }
            for name, owned in self.scalers.items()
        ]
        return JSONResponse({"kind": "HorizontalPodAutoscalerList", "items": items})

    async def _early(self, request: Request, kind: str) -> Response | None:
        """Return what is answered before the request is looked at."""
        last = request.url.path.rpartition("/")[2]
        self.requests.append(f"{request.method} {request.url.path}")
        if self.hangs:
            await asyncio.Event().wait()
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return status(401, "Unauthorized")
        queued = self.failures[f"{request.method} {last}"]
        if queued:
            return queued.pop(0)
        verb = "list" if kind == "horizontalpodautoscalers" else request.method.lower()
        if f"{verb} {kind}" in self.forbidden:
            return status(403, f'{kind} is forbidden: User "x" cannot {verb} it')
        return None


def status(code: int, message: str, **headers: str) -> Response:
    """Return the Status object that an API server answers errors with."""
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message}
    return JSONResponse({**body, "code": code}, code, headers)


def kubeconfig(directory: Path, server: str, token: str = TOKEN, ca: Path | None = None) -> Path:
    """Write a kubeconfig and return its path."""
    cluster: dict[str, Any] = {"server": server}
    if ca is not None:
        cluster["certificate-authority"] = str(ca)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    path = directory / "kubeconfig"
    path.write_text(json.dumps(config))
    return path


@asynccontextmanager
async def serving(cluster: Cluster) -> AsyncIterator[str]:
    """Serve a cluster's API and yield its URL."""
    server = HttpServer(cluster.app(), "127.0.0.1", 0)
    task = asyncio.create_task(server.run())
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        await server.close(task, timeout_s=1.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
