"""A supervisor that only remembers what it was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import grpc

from paceline.v1 import fleet_control_pb2, fleet_control_pb2_grpc

SERVICE_NAME = "paceline.v1.FleetControlService"


class Control(fleet_control_pb2_grpc.FleetControlServiceServicer):
    """Pools by role; can be told to fail or to hang."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.asked: list[tuple[str, int, list[str]]] = []
        self.error: Exception | None = None
        self.hangs = False

    async def GetScale(
        self, request: fleet_control_pb2.GetScaleRequest, context: grpc.aio.ServicerContext
    ) -> fleet_control_pb2.GetScaleResponse:
        await self._trouble()
        return fleet_control_pb2.GetScaleResponse(
            pools=[
                fleet_control_pb2.PoolScale(role=role, replicas=size)
                for role, size in self.sizes.items()
            ]
        )

    async def SetScale(
        self, request: fleet_control_pb2.SetScaleRequest, context: grpc.aio.ServicerContext
    ) -> fleet_control_pb2.SetScaleResponse:
        self.asked.append((request.role, request.replicas, list(request.victims)))
        await self._trouble()
        self.sizes[request.role] = request.replicas
        pool = fleet_control_pb2.PoolScale(role=request.role, replicas=request.replicas)
        return fleet_control_pb2.SetScaleResponse(pool=pool)

    async def _trouble(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
