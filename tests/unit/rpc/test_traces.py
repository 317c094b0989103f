"""Which trace a call is part of, and what the client is told of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from paceline.domain import errors
from paceline.process.spans import NO_CONTEXT, create_tracer, span_var
from paceline.rpc.channel import map_rpc_error, request_metadata
from paceline.rpc.trace_metadata import trace_context
from tests.otlp_receiver import ERROR, OtlpReceiver
from tests.unit.rpc.test_calls import SERVICE, Bench

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


async def _bench(**options: Any) -> AsyncIterator[Bench]:
    bench = Bench(**options)
    await bench.server.start()
    bench.server.set_ready(True)
    yield bench
    await bench.channel.close()
    await bench.server.drain(0)


@pytest.fixture
async def door() -> AsyncIterator[Bench]:
    """A server that clients call."""
    async for bench in _bench(is_door=True):
        bench.service.gate.set()
        yield bench


@pytest.fixture
async def inner() -> AsyncIterator[Bench]:
    """A server that our own processes call."""
    async for bench in _bench():
        bench.service.gate.set()
        yield bench


async def ended(call: Any) -> tuple[errors.PacelineError | None, dict[str, str]]:
    """Read a call to its end; return its error and its trailers."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return map_rpc_error(error), dict(error.trailing_metadata())
    return None, dict(await call.trailing_metadata())


def call_of(bench: Bench, method: str, **options: Any) -> Any:
    if method == "Decode":
        return bench.decode(**options)
    request = bench.channel.unary_unary(f"/{SERVICE}/StopSequence")
    return request(b"", **options)


@pytest.mark.parametrize("method", ["Decode", "StopSequence"])
@pytest.mark.parametrize(
    "error", [None, errors.ExhaustedError("full"), errors.InternalError("x"), ValueError("bug")]
)
async def test_every_call_tells_its_trace_id_however_it_ends(
    door: Bench, method: str, error: Exception | None
) -> None:
    door.service.error = error
    seen = set()
    for _ in range(2):
        failure, trailers = await ended(call_of(door, method))
        assert (failure is None) == (error is None)
        assert trailers["paceline-trace-id"] == door.service.seen_trace.trace_id
        assert len(trailers["paceline-trace-id"]) == 32
        assert "traceparent" not in trailers
        seen.add(trailers["paceline-trace-id"])
    assert len(seen) == 2
    if isinstance(error, errors.PacelineError):
        assert failure is not None
        assert failure.reason == error.reason


async def test_refused_and_undecodable_calls_have_ids_too(door: Bench) -> None:
    call: Any = door.channel.unary_unary(f"/{SERVICE}/StopSequence")
    failure, trailers = await ended(call(b"\xff\xff\xff", metadata=(("traceparent", PARENT),)))
    assert isinstance(failure, errors.InvalidRequestError)
    assert trailers["paceline-trace-id"] == TRACE_ID


async def test_a_callers_trace_goes_on(door: Bench) -> None:
    metadata = (("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2"))
    _, trailers = await ended(call_of(door, "Decode", metadata=metadata))
    assert trailers["paceline-trace-id"] == TRACE_ID
    assert trailers["traceparent"] == PARENT
    assert door.service.seen_trace.traceparent == PARENT
    assert set(door.service.seen_trace.state.split(",")) == {"a=1", "b=2"}


@pytest.mark.parametrize(
    "metadata",
    [
        (("traceparent", "garbage"),),
        (("traceparent", ""),),
        (("traceparent", f"00-{'0' * 32}-00f067aa0ba902b7-01"),),
        (("tracestate", "a=1"),),
    ],
)
async def test_a_caller_that_makes_no_sense_gets_a_trace_of_its_own(
    door: Bench, metadata: tuple[tuple[str, str], ...]
) -> None:
    failure, trailers = await ended(call_of(door, "Decode", metadata=metadata))
    assert failure is None
    assert len(trailers["paceline-trace-id"]) == 32
    assert trailers["paceline-trace-id"] not in (TRACE_ID, "0" * 32)
    assert "traceparent" not in trailers


def test_two_parents_are_none() -> None:
    assert trace_context((("traceparent", PARENT),)) is not None
    assert trace_context((("traceparent", PARENT), ("traceparent", PARENT))) is None
    assert trace_context(None) is None


async def test_inside_the_fleet_traces_are_passed_on_and_never_begun(inner: Bench) -> None:
    _, trailers = await ended(call_of(inner, "StopSequence"))
    assert inner.service.seen_trace == NO_CONTEXT
    assert not trailers.keys() & {"paceline-trace-id", "traceparent"}
    async for door in _bench(is_door=True):
        door.service.gate.set()
        await ended(call_of(door, "StopSequence", metadata=(("traceparent", PARENT),)))
        token = span_var.set(create_tracer("", 1.0, {}).begin("x", door.service.seen_trace))
        try:
            await ended(call_of(inner, "StopSequence", metadata=request_metadata()))
        finally:
            span_var.reset(token)
    assert inner.service.seen_trace.traceparent == PARENT


async def test_health_checks_begin_no_trace(door: Bench) -> None:
    stub: Any = health_pb2_grpc.HealthStub(door.channel)
    call = stub.Check(health_pb2.HealthCheckRequest())
    _, trailers = await ended(call)
    assert "paceline-trace-id" not in trailers


async def test_a_call_is_a_span_with_its_outcome() -> None:
    with OtlpReceiver() as receiver:
        tracer = create_tracer(receiver.endpoint, 1.0, {"service.name": "paceline-test"})
        async for bench in _bench(is_door=True, tracer=tracer):
            bench.service.gate.set()
            _, good = await ended(call_of(bench, "Decode"))
            bench.service.error = errors.ExhaustedError("full")
            _, bad = await ended(
                call_of(bench, "StopSequence", metadata=(("traceparent", PARENT),))
            )
        tracer.close()
        (ok,) = receiver.trace(good["paceline-trace-id"])
        (refused,) = receiver.trace(TRACE_ID)
    assert ok.name == f"{SERVICE}/Decode"
    assert (ok.status, ok.attributes["rpc.response.status_code"]) == (0, "OK")
    assert refused.parent_id == "00f067aa0ba902b7"
    assert refused.attributes["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
    assert (refused.status, refused.attributes["error.type"]) == (ERROR, "queue-full")
    assert bad["traceparent"] == f"00-{TRACE_ID}-{refused.span_id}-01"
