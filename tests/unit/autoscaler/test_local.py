"""Asking a supervisor over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from paceline.autoscaler.targets.base import TargetError
from paceline.autoscaler.targets.local import LocalTarget
from paceline.domain.errors import (
    ExhaustedError,
    InvalidRequestError,
    PacelineError,
    PreconditionError,
    UnavailableError,
)
from paceline.domain.member import Role
from paceline.process.metrics import Metrics
from paceline.rpc.server import GrpcServer, create_server
from paceline.v1 import fleet_control_pb2_grpc
from tests.unit.autoscaler.control import SERVICE_NAME, Control

P, D = Role.PREFILL, Role.DECODE


@pytest.fixture
def control() -> Control:
    return Control({"prefill": 1, "decode": 2})


@pytest.fixture
async def server(control: Control) -> AsyncIterator[GrpcServer]:
    def add(server: grpc.aio.Server) -> None:
        fleet_control_pb2_grpc.add_FleetControlServiceServicer_to_server(control, server)

    server = create_server(Metrics("test"), [SERVICE_NAME], [add], host="127.0.0.1", port=0)
    await server.start()
    yield server
    await server.drain(0)


@pytest.fixture
async def target(server: GrpcServer) -> AsyncIterator[LocalTarget]:
    target = LocalTarget(server.address, timeout_s=5.0)
    yield target
    await target.close()


async def test_pools_are_read_and_set(target: LocalTarget, control: Control) -> None:
    assert await target.read() == {P: 1, D: 2}
    await target.apply(D, 1, ("decode-1", "decode-0"))
    assert control.asked == [("decode", 1, ["decode-1", "decode-0"])]
    assert await target.read() == {P: 1, D: 1}


async def test_a_supervisor_without_a_pool_is_no_target(
    target: LocalTarget, control: Control
) -> None:
    del control.sizes["prefill"]
    with pytest.raises(TargetError, match="no pool of prefill workers") as caught:
        await target.read()
    assert caught.value.reason == "target-not-found"


@pytest.mark.parametrize(
    ("error", "reason", "is_retryable"),
    [
        (UnavailableError("stopping"), "target-unreachable", True),
        (ExhaustedError("wait", retry_after_s=7.0), "target-throttled", True),
        (InvalidRequestError("replicas", "over the most"), "target-refused", False),
        (PreconditionError("not yet"), "target-refused", True),
        (RuntimeError("a bug"), "target-error", True),
    ],
)
async def test_refusals_have_reasons(
    target: LocalTarget,
    control: Control,
    error: Exception,
    reason: str,
    is_retryable: bool,
) -> None:
    control.error = error
    with pytest.raises(TargetError) as caught:
        await target.apply(D, 3, ())
    assert (caught.value.reason, caught.value.is_retryable) == (reason, is_retryable)
    assert caught.value.retry_after_s == (7.0 if isinstance(error, ExhaustedError) else 0.0)
    assert not isinstance(error, PacelineError) or error.message in caught.value.message


async def test_a_supervisor_that_hangs_costs_one_deadline(
    server: GrpcServer, control: Control
) -> None:
    control.hangs = True
    target = LocalTarget(server.address, timeout_s=0.3)
    with pytest.raises(TargetError) as caught:
        await target.read()
    assert caught.value.reason == "target-timeout"
    await target.close()


async def test_a_supervisor_that_is_gone_is_unreachable(
    target: LocalTarget, server: GrpcServer
) -> None:
    await server.drain(0)
    with pytest.raises(TargetError) as caught:
        await target.read()
    assert (caught.value.reason, caught.value.is_retryable) == ("target-unreachable", True)
