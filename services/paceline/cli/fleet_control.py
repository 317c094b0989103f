"""FleetControlService of `paceline up`: how an autoscaler sees and sets the size of pools.

On loopback and not authenticated, like all internal ports.
"""

from __future__ import annotations

from typing import Any

from paceline.cli.pools import POOLS, PoolState, WorkerPools
from paceline.process.metrics import Metrics
from paceline.rpc.server import GrpcServer, create_server
from paceline.v1 import fleet_control_pb2, fleet_control_pb2_grpc

SERVICE_NAME = "paceline.v1.FleetControlService"


class FleetControlServicer:
    """gRPC face of the pools."""

    def __init__(self, pools: WorkerPools) -> None:
        self._pools = pools

    async def GetScale(
        self, request: fleet_control_pb2.GetScaleRequest, context: Any
    ) -> fleet_control_pb2.GetScaleResponse:
        """Return every pool."""
        pools = [_to_proto(self._pools.state(role)) for role in POOLS]
        return fleet_control_pb2.GetScaleResponse(pools=pools)

    async def SetScale(
        self, request: fleet_control_pb2.SetScaleRequest, context: Any
    ) -> fleet_control_pb2.SetScaleResponse:
        """Set the size of one pool."""
        state = self._pools.scale(request.role, request.replicas, request.victims)
        return fleet_control_pb2.SetScaleResponse(pool=_to_proto(state))


async def serve_control(pools: WorkerPools) -> GrpcServer:
    """Serve the pools on any free port of loopback."""

    def add(server: Any) -> None:
        servicer: Any = FleetControlServicer(pools)
        fleet_control_pb2_grpc.add_FleetControlServiceServicer_to_server(servicer, server)

    server = create_server(Metrics("up"), [SERVICE_NAME], [add], host="127.0.0.1", port=0)
    await server.start()
    server.set_ready(True)
    return server


def _to_proto(state: PoolState) -> fleet_control_pb2.PoolScale:
    return fleet_control_pb2.PoolScale(
        role=state.role,
        # What was asked for is what runs or starts: see pools.py.
        replicas=len(state.member_ids),
        member_ids=state.member_ids,
        ending_ids=state.ending_ids,
    )
