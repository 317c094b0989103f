"""Serves WorkerService: what operators and tests ask of a worker of any role."""

from __future__ import annotations

from typing import Any

from paceline.v1 import worker_pb2
from paceline.worker.bridge import EngineBridge


class WorkerServicer:
    """gRPC face of the worker itself."""

    def __init__(self, bridge: EngineBridge) -> None:
        self._bridge = bridge

    async def CheckIntegrity(
        self, request: worker_pb2.CheckIntegrityRequest, context: Any
    ) -> worker_pb2.CheckIntegrityResponse:
        """Check the engine's books."""
        report = await self._bridge.check_integrity()
        return worker_pb2.CheckIntegrityResponse(
            violations=report.violations,
            num_requests=report.num_requests,
            num_held_blocks=report.num_held_blocks,
            num_streams=self._bridge.num_requests,
        )
