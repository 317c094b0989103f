"""Worker processes of one machine, started and ended by `paceline up`."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import TypeVar

import grpc

from paceline.autoscaler.targets.base import TargetError
from paceline.autoscaler.values import POOLS
from paceline.domain.errors import (
    DeadlineError,
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    PacelineError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from paceline.domain.member import Role
from paceline.rpc.channel import map_rpc_error, open_channel
from paceline.v1 import fleet_control_pb2, fleet_control_pb2_grpc

T = TypeVar("T")

_REASONS: tuple[tuple[type[PacelineError], str, bool], ...] = (
    (DeadlineError, "target-timeout", True),
    (UnavailableError, "target-unreachable", True),
    (ExhaustedError, "target-throttled", True),
    (InternalError, "target-error", True),
    (PreconditionError, "target-refused", True),
    (InvalidRequestError, "target-refused", False),
    (UnauthenticatedError, "target-unauthenticated", False),
    (PermissionDeniedError, "target-forbidden", False),
    (UnimplementedError, "target-not-found", False),
)
"""Our error, the reason it has here, whether it may pass by itself."""


class LocalTarget:
    """Asks the supervisor of `paceline up`."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """Take host:port of the supervisor's control port."""
        self._timeout_s = timeout_s
        self._channel = open_channel(address)
        self._stub = fleet_control_pb2_grpc.FleetControlServiceStub(self._channel)

    async def read(self) -> Mapping[Role, int]:
        """Return the workers that the supervisor was last asked for."""
        request = fleet_control_pb2.GetScaleRequest()
        reply = await _answer(self._stub.GetScale(request, timeout=self._timeout_s))
        counts = {pool.role: int(pool.replicas) for pool in reply.pools}
        missing = [role.value for role in POOLS if role.value not in counts]
        if missing:
            text = f"the supervisor has no pool of {', '.join(missing)} workers"
            raise TargetError(text, reason="target-not-found", is_retryable=False)
        return {role: counts[role.value] for role in POOLS}

    async def apply(self, role: Role, replicas: int, victims: Sequence[str]) -> None:
        """Ask for a number of workers; the supervisor drains those that go."""
        request = fleet_control_pb2.SetScaleRequest(
            role=role.value, replicas=replicas, victims=victims
        )
        await _answer(self._stub.SetScale(request, timeout=self._timeout_s))

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


async def _answer(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _target_error(map_rpc_error(error)) from error


def _target_error(error: PacelineError) -> TargetError:
    retry_after_s = error.retry_after_s if isinstance(error, ExhaustedError) else 0.0
    for kind, reason, is_retryable in _REASONS:
        if isinstance(error, kind):
            return TargetError(
                error.message,
                reason=reason,
                is_retryable=is_retryable,
                retry_after_s=retry_after_s,
            )
    return TargetError(error.message, reason="target-failed")
