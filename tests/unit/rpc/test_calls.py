"""What every call on our servers gets: clean errors, ids, counts, an end for stuck readers."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from paceline.domain import errors
from paceline.process.logs import request_id_var
from paceline.process.metrics import Metrics
from paceline.process.spans import NO_CONTEXT, current_span
from paceline.rpc.channel import map_rpc_error, open_channel, request_metadata
from paceline.rpc.interceptors import CODES
from paceline.rpc.server import GrpcServer, create_server
from paceline.v1 import worker_pb2, worker_pb2_grpc
from tests.waiting import until

SERVICE = "paceline.v1.DecodeService"
WRITE_TIMEOUT_S = 0.3
SECRET = "postgres://user:password@host"

ERRORS = [
    errors.InvalidRequestError("sampling.top_p", "must be in (0, 1]"),
    errors.UnauthenticatedError("no key"),
    errors.PermissionDeniedError("not this model"),
    errors.NotFoundError("no such model", reason="other-reason"),
    errors.AlreadyExistsError("runs already"),
    errors.PreconditionError("another model", reason="other-model"),
    errors.ExhaustedError("queue full", retry_after_s=2.5),
    errors.UnavailableError("draining", retry_after_s=0.25, reason="worker-stopping"),
    errors.DeadlineError("too late"),
    errors.RequestCancelledError("by the caller"),
    errors.CorruptDraftError("other bytes"),
    errors.UnimplementedError("not built"),
    errors.InternalError(SECRET, reason="step-failed"),
]


class Service:
    """A stand-in for a role: does what the request's id says."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.num_open = 0
        self.gate = asyncio.Event()
        self.seen_id = ""
        self.seen_trace = NO_CONTEXT

    async def Decode(
        self, request: worker_pb2.DecodeRequest, context: Any
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        self.num_open += 1
        try:
            self.seen_id, self.seen_trace = request_id_var.get(), current_span().context
            yield worker_pb2.DecodeResponse(local_hit_tokens=1)
            if self.error is not None:
                raise self.error
            if request.spec.request_id == "flood":
                flood = worker_pb2.TokenChunk(token_ids=range(1000))
                while True:
                    yield worker_pb2.DecodeResponse(chunks=[flood])
            await self.gate.wait()
            yield worker_pb2.DecodeResponse(local_hit_tokens=2)
        finally:
            self.num_open -= 1

    async def StopSequence(
        self, request: worker_pb2.StopSequenceRequest, context: Any
    ) -> worker_pb2.StopSequenceResponse:
        self.seen_id, self.seen_trace = request_id_var.get(), current_span().context
        if self.error is not None:
            raise self.error
        return worker_pb2.StopSequenceResponse()


class Bench:
    """One server with one service, and a channel to it."""

    def __init__(self, **options: Any) -> None:
        self.service = Service()
        self.metrics = Metrics("test")

        def add(server: grpc.aio.Server) -> None:
            worker_pb2_grpc.add_DecodeServiceServicer_to_server(self.service, server)

        self.server: GrpcServer = create_server(
            self.metrics,
            [SERVICE],
            [add],
            host="127.0.0.1",
            port=0,
            write_timeout_s=WRITE_TIMEOUT_S,
            **options,
        )
        self.channel = open_channel(self.server.address)
        stub: Any = worker_pb2_grpc.DecodeServiceStub
        self.stub = stub(self.channel)

    def decode(self, request_id: str = "", **options: Any) -> Any:
        """Open a stream."""
        spec = worker_pb2.GenerationSpec(request_id=request_id)
        return self.stub.Decode(worker_pb2.DecodeRequest(spec=spec), **options)

    async def stop_sequence(self, **options: Any) -> Any:
        """Make a unary call."""
        return await self.stub.StopSequence(worker_pb2.StopSequenceRequest(), **options)

    def count(self, method: str, code: str, reason: str = "") -> float:
        """Return how many calls ended so."""
        labels = {"method": f"/{SERVICE}/{method}", "code": code, "reason": reason}
        value = self.metrics.registry.get_sample_value("paceline_rpc_requests_total", labels)
        return value or 0.0


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.server.start()
    bench.server.set_ready(True)
    yield bench
    await bench.channel.close()
    await bench.server.drain(0)


async def _failed(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return failure.value


def test_every_error_class_has_a_code_and_is_tried_here() -> None:
    classes = set(errors.PacelineError.__subclasses__())
    domain = {cls for cls in classes if cls.__module__ == errors.__name__}
    assert domain == {cls for cls, _ in CODES} == {type(error) for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_errors_survive_the_wire(
    bench: Bench, error: errors.PacelineError, is_stream: bool
) -> None:
    bench.service.error = error
    failure = await _failed(bench.decode() if is_stream else bench.stop_sequence())
    mapped = map_rpc_error(failure)
    assert type(mapped) is type(error)
    assert mapped.reason == error.reason
    is_hidden = isinstance(error, errors.InternalError)
    assert mapped.message == ("internal error" if is_hidden else error.message)
    for name in ("field", "retry_after_s"):
        assert getattr(mapped, name, None) == getattr(error, name, None)
    method = "Decode" if is_stream else "StopSequence"
    assert bench.count(method, failure.code().name, error.reason) == 1


@pytest.mark.parametrize("is_stream", [False, True])
async def test_text_of_unknown_exceptions_stays_in_our_log(
    bench: Bench, is_stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bench.service.error = ValueError(SECRET)
    metadata = (("x-request-id", "abc-1"),)
    call = bench.decode(metadata=metadata) if is_stream else bench.stop_sequence(metadata=metadata)
    with caplog.at_level(logging.ERROR):
        failure = await _failed(call)
    status: Any = rpc_status.from_call(failure)
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in str(failure.trailing_metadata()) + str(failure.details()) + str(status)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.metadata["request_id"]) == ("paceline", "abc-1")
    (record,) = [r for r in caplog.records if r.getMessage() == "unexpected-error"]
    assert record.exc_info is not None and SECRET in str(record.exc_info[1])


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f"])
@pytest.mark.parametrize("method", ["Decode", "StopSequence"])
async def test_messages_that_cannot_be_decoded_are_invalid(
    bench: Bench, data: bytes, method: str
) -> None:
    path = f"/{SERVICE}/{method}"
    open_call = bench.channel.unary_stream if method == "Decode" else bench.channel.unary_unary
    call: Any = open_call(path)
    if method == "Decode" and data == b"\x0a\x02\xff\xfe":
        data = b"\x0a\x04\x0a\x02\xff\xfe"  # Bad UTF-8 in spec.request_id.
    mapped = map_rpc_error(await _failed(call(data)))
    assert isinstance(mapped, errors.InvalidRequestError)
    assert (mapped.field, mapped.reason) == ("request", "undecodable-message")
    assert bench.count(method, "INVALID_ARGUMENT", "undecodable-message") == 1
    assert bench.service.num_open == 0


async def test_a_client_that_does_not_read_is_cut_off(bench: Bench) -> None:
    call = bench.decode("flood")
    await call.read()
    await until(lambda: bench.count("Decode", "ABORTED", "slow-client") == 1, 10)
    assert bench.service.num_open == 0
    # It learns so when it reads on.
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        while await call.read() is not grpc.aio.EOF:
            pass
    assert failure.value.code() is grpc.StatusCode.ABORTED


async def test_a_cut_off_client_may_also_leave(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    call = bench.decode("flood")
    await call.read()
    await until(lambda: bench.count("Decode", "ABORTED", "slow-client") == 1, 10)
    num_tasks = len(asyncio.all_tasks())
    call.cancel()
    await until(lambda: len(asyncio.all_tasks()) < num_tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_other_calls_do_not_wait_for_a_stuck_reader(bench: Bench) -> None:
    stuck = bench.decode("flood")
    await stuck.read()
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await bench.stop_sequence()
    stuck.cancel()


async def test_calls_that_the_client_ends_are_counted(bench: Bench) -> None:
    call = bench.decode()
    await call.read()
    call.cancel()
    await until(lambda: bench.count("Decode", "CANCELLED") == 1)
    await _failed(bench.decode(timeout=0.2))
    await until(lambda: bench.count("Decode", "DEADLINE_EXCEEDED") == 1)
    await until(lambda: bench.service.num_open == 0)


@pytest.mark.parametrize(
    ("sent", "seen"),
    [("req-1", "req-1"), ("a b", "a b"), ("x" * 128, "x" * 128), ("x" * 129, "")],
)
async def test_request_ids_are_taken_when_sane(bench: Bench, sent: str, seen: str) -> None:
    await bench.stop_sequence(metadata=(("x-request-id", sent),))
    assert bench.service.seen_id == seen


@pytest.mark.parametrize(
    ("own", "seen"), [("hop-7", "hop-7"), ("", ""), ("line\nbreak", ""), ("\u00fc", "")]
)
async def test_request_ids_go_on_to_the_next_hop_if_they_can(
    bench: Bench, own: str, seen: str
) -> None:
    token = request_id_var.set(own)
    try:
        await bench.stop_sequence(metadata=request_metadata())
    finally:
        request_id_var.reset(token)
    assert bench.service.seen_id == seen


async def test_a_drain_lets_streams_finish_and_refuses_new_calls(bench: Bench) -> None:
    call = bench.decode()
    await call.read()
    drain = asyncio.create_task(bench.server.drain(10))
    await asyncio.sleep(0)
    for _ in range(20):
        refused = map_rpc_error(await _failed(bench.stop_sequence(timeout=1)))
        assert isinstance(refused, errors.UnavailableError)
        assert refused.reason == "draining"
    health: Any = health_pb2_grpc.HealthStub(bench.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert not drain.done()
    bench.service.gate.set()
    assert (await call.read()).local_hit_tokens == 2
    assert await call.read() is grpc.aio.EOF
    async with asyncio.timeout(2):
        await drain


async def test_calls_in_the_moment_of_a_stop_may_be_tried_elsewhere(bench: Bench) -> None:
    reasons = set()

    async def call_until_refused() -> None:
        while True:
            try:
                await bench.stop_sequence(timeout=1)
            except grpc.aio.AioRpcError as error:
                reasons.add(type(map_rpc_error(error)))
                return

    callers = [asyncio.create_task(call_until_refused()) for _ in range(50)]
    await asyncio.sleep(0.05)
    await bench.server.drain(5)
    await asyncio.gather(*callers)
    assert reasons == {errors.UnavailableError}


async def test_a_drain_ends_when_its_grace_does(bench: Bench) -> None:
    call = bench.decode()
    await call.read()
    async with asyncio.timeout(2):
        await bench.server.drain(0.2)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.read()
    assert isinstance(map_rpc_error(failure.value), errors.UnavailableError)


async def test_health_follows_readiness_and_ends_its_watches(bench: Bench) -> None:
    stub: Any = health_pb2_grpc.HealthStub(bench.channel)
    status = health_pb2.HealthCheckResponse

    async def check(service: str) -> Any:
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    for service in ("", SERVICE, "grpc.health.v1.Health"):
        assert await check(service) == status.SERVING
    unknown = await _failed(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert unknown.code() is grpc.StatusCode.NOT_FOUND

    watches = [stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE)) for _ in range(2)]
    for watch in watches:
        assert (await watch.read()).status == status.SERVING
    bench.server.set_ready(False)
    for watch in watches:
        assert (await watch.read()).status == status.NOT_SERVING
    assert await check("") == status.NOT_SERVING
    bench.server.set_ready(True)
    for watch in watches:
        assert (await watch.read()).status == status.SERVING
    async with asyncio.timeout(2):
        await bench.server.drain(30)
    for watch in watches:
        assert (await watch.read()).status == status.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF


async def test_reflection_names_the_services(bench: Bench) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(bench.channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    await call.done_writing()
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names


async def test_unknown_methods_are_unimplemented(bench: Bench) -> None:
    call: Any = bench.channel.unary_unary(f"/{SERVICE}/Nothing")
    assert (await _failed(call(b""))).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_garbage_on_the_port_hurts_nobody(bench: Bench) -> None:
    with socket.create_connection(("127.0.0.1", bench.server.port)) as sock:
        sock.sendall(b"\x16\x03\x01" + bytes(500))
        sock.sendall(json.dumps({"not": "http2"}).encode())
        await bench.stop_sequence()


async def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}.*in use"):
            create_server(Metrics("test"), [], [], host="127.0.0.1", port=port)


async def test_tasks_of_the_loop_are_a_metric(bench: Bench) -> None:
    value = await asyncio.to_thread(bench.metrics.registry.get_sample_value, "paceline_tasks")
    assert value is not None and value >= 1
