"""The standard health service (grpc.health.v1): one status for all services of a process.

Unlike the packaged one it ends its watches when the server drains; they would hold a drain
for its whole grace. rpc/server.py owns it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from paceline.domain.errors import NotFoundError

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Tells whether work is welcome; not before `set_ready`, never again after `close`."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self._names = {"", SERVICE_NAME, *service_names}
        self._status = _NOT_SERVING
        self._is_closed = False
        self._changed = asyncio.Event()

    def set_ready(self, is_ready: bool) -> None:
        """Set the status of all services."""
        if not self._is_closed:
            self._status = _SERVING if is_ready else _NOT_SERVING
            self._wake()

    def close(self) -> None:
        """Say NOT_SERVING for good and end the watches."""
        self._status, self._is_closed = _NOT_SERVING, True
        self._wake()

    async def Check(self, request: Any, context: Any) -> Any:
        """Return the status of a service; "" is the process."""
        if request.service not in self._names:
            raise NotFoundError("no such service", reason="service-not-found")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Yield the status of a service now and at each change."""
        is_known, last = request.service in self._names, None
        while True:
            changed = self._changed
            status = self._status if is_known else _UNKNOWN
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            if self._is_closed:
                return
            await changed.wait()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
